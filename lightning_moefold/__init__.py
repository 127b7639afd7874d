# SPDX-License-Identifier: Apache-2.0
"""MoE Parallel Folding for PyTorch Lightning."""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_moefold.adapters import LoRA
from lightning_moefold.errors import FoldError
from lightning_moefold.fold import Fold
from lightning_moefold.models import MoECausalLM, MoEConfig
from lightning_moefold.planner.search.auto import AutoFold
from lightning_moefold.strategy import MoEFoldStrategy

__version__ = "0.1.0"
__all__ = ["AutoFold", "Fold", "FoldError", "LoRA", "MoECausalLM", "MoEConfig", "MoEFoldStrategy"]

if MoEFoldStrategy.strategy_name not in StrategyRegistry:
    StrategyRegistry.register(
        MoEFoldStrategy.strategy_name,
        MoEFoldStrategy,
        description="MoE Parallel Folding: separate mappings for attention and experts",
    )

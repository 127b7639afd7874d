# SPDX-License-Identifier: Apache-2.0
"""MoE Parallel Folding for PyTorch Lightning."""

from typing import TYPE_CHECKING

from lightning_moefold.lazy import lazy_names
from lightning_moefold.lifecycle.registration import register

if TYPE_CHECKING:
    from lightning_moefold.adapters import LoRA
    from lightning_moefold.errors import FoldError, MoEFoldError
    from lightning_moefold.fold import Fold
    from lightning_moefold.models.causal_lm import MoECausalLM
    from lightning_moefold.models.config import MoEConfig
    from lightning_moefold.planner.search.auto import AutoFold
    from lightning_moefold.sampler import ResumableSampler
    from lightning_moefold.strategy import MoEFoldStrategy

__version__ = "0.1.0"
__all__ = [
    "AutoFold", "Fold", "FoldError", "LoRA", "MoECausalLM", "MoEConfig", "MoEFoldError", "MoEFoldStrategy",
    "ResumableSampler",
]  # fmt: skip
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "AutoFold": "planner.search.auto",
        "Fold": "fold",
        "FoldError": "errors",
        "LoRA": "adapters",
        "MoECausalLM": "models.causal_lm",
        "MoEConfig": "models.config",
        "MoEFoldError": "errors",
        "MoEFoldStrategy": "strategy",
        "ResumableSampler": "sampler",
    },
)

register()

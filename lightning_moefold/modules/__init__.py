# SPDX-License-Identifier: Apache-2.0
"""Blocks of MoE transformers, usable in any LightningModule; plain modules outside a strategy."""

from lightning_moefold.modules.attention import Attention
from lightning_moefold.modules.balance import load_balancing_loss
from lightning_moefold.modules.decoder import DecoderLayer
from lightning_moefold.modules.experts import Experts
from lightning_moefold.modules.mlp import GatedMLP
from lightning_moefold.modules.moe import MoELayer
from lightning_moefold.modules.norm import RMSNorm
from lightning_moefold.modules.router import Router

__all__ = ["Attention", "DecoderLayer", "Experts", "GatedMLP", "MoELayer", "RMSNorm", "Router", "load_balancing_loss"]

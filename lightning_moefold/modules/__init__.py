# SPDX-License-Identifier: Apache-2.0
"""Blocks of MoE transformers, usable in any LightningModule; plain modules outside a strategy."""

from lightning_moefold.modules.attention import Attention
from lightning_moefold.modules.balance import load_balancing_loss, router_z_loss
from lightning_moefold.modules.decoder import DecoderLayer
from lightning_moefold.modules.experts import Experts
from lightning_moefold.modules.mlp import GatedMLP
from lightning_moefold.modules.moe import MoELayer
from lightning_moefold.modules.norm import RMSNorm
from lightning_moefold.modules.routers import (
    Router,
    RouterOptions,
    SwipeOptions,
    TopologyAwareOptions,
    register_router,
    update_expert_bias,
)

__all__ = [
    "Attention",
    "DecoderLayer",
    "Experts",
    "GatedMLP",
    "MoELayer",
    "RMSNorm",
    "Router",
    "RouterOptions",
    "SwipeOptions",
    "TopologyAwareOptions",
    "load_balancing_loss",
    "register_router",
    "router_z_loss",
    "update_expert_bias",
]

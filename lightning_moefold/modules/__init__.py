# SPDX-License-Identifier: Apache-2.0
"""Blocks of MoE transformers. They work in any LightningModule, and are plain modules outside of a strategy."""

from typing import TYPE_CHECKING

from lightning_moefold.lazy import lazy_names

if TYPE_CHECKING:
    from lightning_moefold.modules.attention import Attention
    from lightning_moefold.modules.balance import load_balancing_loss, router_z_loss
    from lightning_moefold.modules.decoder import DecoderLayer
    from lightning_moefold.modules.experts import Experts
    from lightning_moefold.modules.mlp import GatedMLP
    from lightning_moefold.modules.moe import MoELayer
    from lightning_moefold.modules.norm import RMSNorm
    from lightning_moefold.modules.routers import Router, RouterOptions, update_expert_bias
    from lightning_moefold.modules.routers.options import SwipeOptions, TopologyAwareOptions
    from lightning_moefold.modules.routers.registry import register_router

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
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Attention": "attention",
        "DecoderLayer": "decoder",
        "Experts": "experts",
        "GatedMLP": "mlp",
        "MoELayer": "moe",
        "RMSNorm": "norm",
        "Router": "routers",
        "RouterOptions": "routers",
        "SwipeOptions": "routers.options",
        "TopologyAwareOptions": "routers.options",
        "load_balancing_loss": "balance",
        "register_router": "routers.registry",
        "router_z_loss": "balance",
        "update_expert_bias": "routers",
    },
)

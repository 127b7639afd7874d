# SPDX-License-Identifier: Apache-2.0
"""Routers, their registry, and the statistics for their losses and biases."""

from typing import TYPE_CHECKING

from lightning_moefold.lazy import lazy_names

if TYPE_CHECKING:
    from lightning_moefold.modules.routers.expert_bias import update_expert_bias
    from lightning_moefold.modules.routers.force_balanced import ForceBalancedRouter
    from lightning_moefold.modules.routers.options import RouterOptions, SwipeOptions, TopologyAwareOptions
    from lightning_moefold.modules.routers.registry import RouterSpec, make_router, register_router, router_options
    from lightning_moefold.modules.routers.router import Router, RouterOutput
    from lightning_moefold.modules.routers.swipe import SwipeRouter
    from lightning_moefold.modules.routers.topology_aware import TopologyAwareRouter

__all__ = [
    "ForceBalancedRouter",
    "Router",
    "RouterOptions",
    "RouterOutput",
    "RouterSpec",
    "SwipeOptions",
    "SwipeRouter",
    "TopologyAwareOptions",
    "TopologyAwareRouter",
    "make_router",
    "register_router",
    "router_options",
    "update_expert_bias",
]
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "ForceBalancedRouter": "force_balanced",
        "Router": "router",
        "RouterOptions": "options",
        "RouterOutput": "router",
        "RouterSpec": "registry",
        "SwipeOptions": "options",
        "SwipeRouter": "swipe",
        "TopologyAwareOptions": "options",
        "TopologyAwareRouter": "topology_aware",
        "make_router": "registry",
        "register_router": "registry",
        "router_options": "registry",
        "update_expert_bias": "expert_bias",
    },
)

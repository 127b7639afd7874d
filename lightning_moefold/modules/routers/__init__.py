# SPDX-License-Identifier: Apache-2.0
"""Routers, their registry, and the statistics for their losses and biases."""

from typing import TYPE_CHECKING

from lightning_moefold.lazy import lazy_names

if TYPE_CHECKING:
    from lightning_moefold.modules.routers.expert_bias import update_expert_bias
    from lightning_moefold.modules.routers.options import RouterOptions
    from lightning_moefold.modules.routers.registry import RouterSpec, make_router
    from lightning_moefold.modules.routers.router import Router, RouterOutput

__all__ = ["Router", "RouterOptions", "RouterOutput", "RouterSpec", "make_router", "update_expert_bias"]
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Router": "router",
        "RouterOptions": "options",
        "RouterOutput": "router",
        "RouterSpec": "registry",
        "make_router": "registry",
        "update_expert_bias": "expert_bias",
    },
)

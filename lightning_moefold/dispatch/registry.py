# SPDX-License-Identifier: Apache-2.0
"""The dispatchers by name."""

from __future__ import annotations

from lightning_moefold.dispatch.allgather import AllGatherDispatcher
from lightning_moefold.dispatch.alltoall import AllToAllDispatcher
from lightning_moefold.dispatch.base import ExpertAxes, TokenDispatcher
from lightning_moefold.dispatch.config import DispatchConfig, choose_dispatcher
from lightning_moefold.dispatch.deduplicated import DeduplicatedDispatcher
from lightning_moefold.dispatch.hierarchical import HierarchicalDispatcher

DISPATCHERS: dict[str, type[TokenDispatcher]] = {
    "alltoall": AllToAllDispatcher,
    "allgather": AllGatherDispatcher,
    "deduplicated": DeduplicatedDispatcher,
    "hierarchical": HierarchicalDispatcher,
}


def make_dispatcher(
    config: DispatchConfig, num_experts: int, top_k: int, axes: ExpertAxes = ExpertAxes()
) -> TokenDispatcher:
    """The dispatcher of a layer; arguments are those of :class:`.TokenDispatcher`."""
    name: str = choose_dispatcher(config, num_experts, top_k, axes.ep.size)  # by node only if :func:`.settle` said so
    if axes.etp_ep.size == 1 and not config.pad_to_capacity:
        name = "allgather"  # on one rank nothing travels, and experts read the tokens where they are
    elif name == "hierarchical" and axes.nodes is None:
        name = "deduplicated"
    return DISPATCHERS[name](config, num_experts, top_k, axes)

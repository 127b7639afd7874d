# SPDX-License-Identifier: Apache-2.0
"""Predicts the time of a collective from the places of its group's ranks on the nodes. Pure Python.

A collective is much slower if its group leaves the node, which is why folding matters. A group of an axis consists of
``size`` ranks at distance ``stride`` (:func:`axis_shape`), so its place on the nodes follows from the fold.

Costs are alpha-beta. With n ranks, l of them on each node, N nodes, S bytes of the gathered tensor::

    all-gather, reduce-scatter   (n-1)/n S / rate + hops                               the latter at a rate of its own
    all-reduce                   both of them
    all-to-all                   max((n-l)/n V / inter, (l-1)/n V / intra) + hops          V bytes sent by one rank

A ring that leaves the node enters and leaves it once for each of its local ranks, over the port of each, so its rate is
``min(l * inter, intra)``: a group with eight ranks on a node has eight ports, a group with one rank there has one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from lightning_moefold.fold import Fold
from lightning_moefold.planner.machine.hardware import Hardware, Link


@dataclass(frozen=True)
class GroupShape:
    """How the ranks of a group are spread over nodes.

    Args:
        size: Number of ranks n.
        nodes: Number of nodes N that the widest group of the axis touches.
        local: Fewest ranks l that such a group has on a node it touches; n if it stays within one node.
    """

    size: int
    nodes: int
    local: int

    @property
    def crosses(self) -> bool:
        """Whether the group leaves the node."""
        return self.nodes > 1


@cache
def group_shape(size: int, stride: int, per_node: int) -> GroupShape:
    """Returns the worst placement of a group of ``size`` ranks at distance ``stride`` on nodes of ``per_node`` ranks.

    Groups start at ``block * size * stride + offset``; only the start's position within a node matters.
    """
    if size == 1:
        return GroupShape(1, 1, 1)
    span = size * stride
    starts = {
        (block * span + offset) % per_node for block in range(per_node) for offset in range(min(stride, per_node))
    }
    worst = GroupShape(size, 1, size)
    for start in starts:
        counts: dict[int, int] = {}
        for rank in range(start, start + span, stride):
            counts[rank // per_node] = counts.get(rank // per_node, 0) + 1
        found = GroupShape(size, len(counts), min(counts.values()))
        if (found.nodes, -found.local) > (worst.nodes, -worst.local):
            worst = found
    return worst


def axis_stride(fold: Fold, axis: str) -> int:
    """Returns the distance of neighbouring ranks on an axis of a fold (``dp_cp`` and ``etp_ep`` are contiguous products)."""
    return {
        "tp": 1, "cp": fold.tp, "dp": fold.tp * fold.cp, "dp_cp": fold.tp, "tp_cp": 1,
        "etp": 1, "ep": fold.etp, "edp": fold.etp * fold.ep, "etp_ep": 1, "pp": fold.world_size // fold.pp,
    }[axis]  # fmt: skip


def axis_shape(fold: Fold, axis: str, per_node: int) -> GroupShape:
    """Returns how the groups of an axis of ``fold`` are spread over nodes."""
    return group_shape(fold.size(axis), axis_stride(fold, axis), per_node)


@dataclass(frozen=True)
class Links:
    """Predicts collectives on a machine; all results are in seconds."""

    hardware: Hardware

    def gather(self, shape: GroupShape, total_bytes: float) -> float:
        """Returns the time of an all-gather whose result has ``total_bytes``."""
        return self._ring(shape, total_bytes, 1.0)

    def scatter(self, shape: GroupShape, total_bytes: float) -> float:
        """Returns the time of a reduce-scatter of ``total_bytes`` on each rank."""
        return self._ring(shape, total_bytes, self.hardware.kernels.reduce_efficiency)

    def _ring(self, shape: GroupShape, total_bytes: float, reach: float) -> float:
        if shape.size == 1 or total_bytes <= 0:
            return 0.0
        intra, inter = self.hardware.intra, self.hardware.inter
        rate = min(shape.local * inter.rate, intra.rate) if shape.crosses else intra.rate
        return (shape.size - 1) / shape.size * total_bytes / (rate * reach) + self._hops(shape)

    def reduce(self, shape: GroupShape, total_bytes: float) -> float:
        """Returns the time of an all-reduce of ``total_bytes``: a reduce-scatter and an all-gather."""
        return self.gather(shape, total_bytes) + self.scatter(shape, total_bytes)

    def exchange(self, shape: GroupShape, sent_bytes: float) -> float:
        """Returns the time of an all-to-all whose busiest rank sends or receives ``sent_bytes``, including its part for itself."""
        if shape.size == 1 or sent_bytes <= 0:
            return 0.0
        reach = self.hardware.kernels.alltoall_efficiency
        far = (shape.size - shape.local) / shape.size * sent_bytes / (self.hardware.inter.rate * reach)
        near = (shape.local - 1) / shape.size * sent_bytes / (self.hardware.intra.rate * reach)
        return max(far, near) + self._hops(shape)

    def neighbour(self, shape: GroupShape, sent_bytes: float) -> float:
        """Returns the time of a message to the next rank of the group, over the slowest hop."""
        if shape.size == 1:
            return 0.0
        link: Link = self.hardware.inter if shape.crosses else self.hardware.intra
        return sent_bytes / link.rate + link.latency + self.hardware.kernels.collective

    def to_host(self, moved_bytes: float) -> float:
        """Returns the time to copy bytes between a rank and its host's memory, one way."""
        return moved_bytes / self.hardware.host.rate + self.hardware.host.latency if moved_bytes > 0 else 0.0

    def empty(self, shape: GroupShape) -> float:
        """Returns the time of a collective over the group with negligible bytes."""
        return 0.0 if shape.size == 1 else self._hops(shape)

    def _hops(self, shape: GroupShape) -> float:
        hops = (shape.nodes - 1) * self.hardware.inter.latency + (shape.local - 1) * self.hardware.intra.latency
        return self.hardware.kernels.collective + hops

    def hidden(self, cost: float, window: float) -> float:
        """Returns the exposed seconds of a communication of ``cost`` seconds that overlaps with ``window`` seconds of compute."""
        lost = 1 - self.hardware.kernels.overlap
        return max(cost - window, 0.0) + lost * min(cost, window)

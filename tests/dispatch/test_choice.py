# SPDX-License-Identifier: Apache-2.0
"""What ``"auto"`` stands for: by sizes alone, and the same on every rank."""

from __future__ import annotations

import itertools

import pytest

from lightning_moefold import Fold
from lightning_moefold.dispatch import DispatchConfig, choose_dispatcher, settle
from lightning_moefold.fold import expert_nodes
from lightning_moefold.planner.cost.pairs import pairs_of
from lightning_moefold.planner.cost.routing import BALANCED
from lightning_moefold.testing import RankPool
from tests.dispatch import jobs_dispatch

AUTO = DispatchConfig("auto", node_size=8)


@pytest.mark.parametrize(
    ("fold", "world", "experts", "top", "expected"),
    [
        ("ep16", 16, 64, 8, "hierarchical"),  # 2.0 of 2 nodes, 6.8 of 16 ranks
        ("ep64", 64, 64, 8, "hierarchical"),  # 5.4 of 8 nodes, 8 of 64 ranks
        ("ep16 etp2", 64, 64, 8, "hierarchical"),  # 3.7 of 4 nodes, 6.8 of 16 ranks
        ("ep128", 128, 128, 8, "alltoall"),  # 6.6 of 16 nodes, 8 of 128 ranks: little is shared
        ("ep16", 16, 64, 2, "alltoall"),  # 1.5 of 2 nodes, 2.0 of 16 ranks
        ("ep8", 16, 64, 8, "deduplicated"),  # in one node
        ("ep2 etp8", 16, 64, 4, "allgather"),  # one rank of ep in a node
        ("ep4 etp8", 32, 64, 4, "deduplicated"),
        ("ep2 etp16", 32, 64, 1, "alltoall"),  # an expert spans nodes
        ("ep12", 12, 24, 8, "deduplicated"),  # nodes do not divide the group
        ("", 16, 64, 8, "alltoall"),
    ],
)
def test_by_sizes(fold: str, world: int, experts: int, top: int, expected: str) -> None:
    assert settle(AUTO, experts, top, Fold.parse(fold, world)).dispatcher == expected


def test_what_only_another_can_do_stays() -> None:
    fold = Fold.parse("ep16", 16)
    assert settle(DispatchConfig("auto", chunks=2, node_size=8), 64, 8, fold).dispatcher == "alltoall"
    padded = DispatchConfig("auto", capacity_factor=1.0, pad_to_capacity=True, node_size=8)
    assert settle(padded, 64, 8, fold).dispatcher == "alltoall"
    assert settle(DispatchConfig("auto", capacity_factor=1.0, node_size=8), 64, 8, fold).dispatcher == "hierarchical"
    assert settle(DispatchConfig("auto"), 64, 8, fold).dispatcher == "deduplicated"  # nobody said what a node is
    for name in ("alltoall", "deduplicated", "hierarchical", "allgather"):
        assert settle(DispatchConfig(name, node_size=8), 64, 8, fold).dispatcher == name  # type: ignore[arg-type]


@pytest.mark.parametrize(("experts", "top"), [(8, 2), (64, 2), (64, 4), (64, 8), (256, 8)])
def test_by_the_pairs_that_the_planner_counts(experts: int, top: int) -> None:
    """Each choice sends what it is said to save, by expectations that are compared with drawn tokens elsewhere."""
    for ep, nodes in itertools.product([2, 4, 8, 16, 32, 64], [1, 2, 4, 8]):
        if ep > experts or (nodes > 1 and (ep % nodes or ep == nodes)):
            continue
        by_rank, by_node = (pairs_of(BALANCED, experts, top, n).mean for n in (ep, nodes))
        name = choose_dispatcher(AUTO, experts, top, ep, nodes)
        if name == "allgather":
            assert by_rank >= 0.9 * ep
        elif name == "hierarchical":
            assert by_node <= 0.75 * by_rank
        elif name == "deduplicated":
            assert by_rank <= 0.9 * top
            assert nodes == 1 or by_node >= 0.75 * by_rank
        else:
            assert by_rank >= 0.9 * top


@pytest.mark.parametrize(("world", "node_size"), [(8, 2), (8, 4), (12, 4), (12, 3), (16, 4), (16, 6), (24, 8), (24, 1)])
def test_two_levels_are_those_of_the_rank_groups(world: int, node_size: int) -> None:
    """Of every fold: more than one node, as many ranks of each group in each, several of ep, and whole experts."""
    for fold in Fold.enumerate(world):
        cuts = []
        for axis in ("ep", "etp_ep"):
            parts = [[[r for r in group if r // node_size == n] for n in range(world)] for group in fold.groups(axis)]
            sizes = [[len(part) for part in group if part] for group in parts]
            cuts.append({tuple(size) for size in sizes})
        expected = 1
        if len(cuts[0]) == len(cuts[1]) == 1:
            (ep,), (joint,) = cuts
            if len(set(ep)) == 1 and len(ep) > 1 and ep[0] > 1 and joint == tuple(n * fold.etp for n in ep):
                expected = len(ep)
        assert expert_nodes(fold.ep, fold.etp, node_size) == expected, str(fold)


@pytest.mark.parametrize(
    ("fold", "ranks", "node_size", "top", "expected"),
    [
        ("ep4", 4, 2, 4, "HierarchicalDispatcher"),
        ("ep4", 4, 4, 4, "DeduplicatedDispatcher"),
        ("ep2 etp2", 4, 2, 4, "AllGatherDispatcher"),
        pytest.param("ep4 etp2", 8, 4, 4, "HierarchicalDispatcher", marks=pytest.mark.slow),
        pytest.param("tp2 pp2 | ep4", 8, 2, 4, "HierarchicalDispatcher", marks=pytest.mark.slow),
        pytest.param("ep8", 8, 4, 3, "HierarchicalDispatcher", marks=pytest.mark.slow),
        pytest.param("ep8", 8, 2, 2, "AllToAllDispatcher", marks=pytest.mark.slow),
    ],
)
@pytest.mark.more
def test_every_rank_takes_the_same(
    pool: RankPool, fold: str, ranks: int, node_size: int, top: int, expected: str
) -> None:
    """A layer bound to the mesh; on 'hierarchical', its axes are those of the mesh."""
    found = pool.run(jobs_dispatch.chosen, fold, node_size, top, ranks=ranks)
    assert [name for name, _ in found] == [expected] * ranks
    if expected == "HierarchicalDispatcher":
        assert {len(nodes) for _, nodes in found} == {expert_nodes(*_sizes(fold, ranks), node_size)}


def _sizes(fold: str, ranks: int) -> tuple[int, int]:
    parsed = Fold.parse(fold, ranks)
    return parsed.ep, parsed.etp

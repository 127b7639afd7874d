# SPDX-License-Identifier: Apache-2.0
"""Dispatch followed by combine is the plain weighted sum, whatever the routing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_moefold.dispatch.permutation import Copies, permute, sort_by_expert, unpermute
from lightning_moefold.planner.cost.pairs import pairs_of
from lightning_moefold.planner.cost.routing import BALANCED
from lightning_moefold.testing import RankPool
from tests.dispatch import jobs_dispatch
from tests.quick import quick

KINDS = [
    "plain", "uneven", "one rank empty", "all empty", "all to one", "padding", "a rank of padding", "dropped",
]  # fmt: skip


@pytest.mark.parametrize("ranks", quick([1, 2, 4], 1, 4))
def test_round_trip(pool: RankPool, ranks: int) -> None:
    sizes = [n for n in (1, 2, 4) if n <= ranks]
    folds = [f"ep{ep} etp{etp}" for ep in sizes for etp in sizes if ep * etp <= ranks]
    names = list(jobs_dispatch.CONFIGS)
    cases = len(folds) * len(KINDS) * len(names)
    assert pool.run(jobs_dispatch.check, folds, KINDS, names, ranks=ranks) == [cases] * ranks


@pytest.mark.parametrize("fold", quick(["ep2", "ep2 etp2", "ep4"], "ep2 etp2"))
def test_chunks_have_the_same_bits(pool: RankPool, fold: str) -> None:
    ranks = 4 if fold != "ep2" else 2
    assert pool.run(jobs_dispatch.bits_of_chunks, fold, ranks=ranks) == [[True] * 6] * ranks


def test_bytes_on_the_wire(pool: RankPool) -> None:
    """Deduplication sends a token once to each other rank that wants it, with a little beside; never more than all-to-all."""
    size, row = 512, 512 * 4
    plain = pool.run(jobs_dispatch.bytes_sent, "alltoall", "ep4", 50, size, ranks=4)
    for sent, once in zip(
        plain, pool.run(jobs_dispatch.bytes_sent, "deduplicated", "ep4", 50, size, ranks=4), strict=True
    ):
        assert once["tokens"] == once["pairs"] * row
        assert once["pairs"] > 0
        assert once["tokens"] + once["else"] < 1.02 * once["pairs"] * row
        assert once["tokens"] + once["else"] < sent["tokens"] + sent["else"]
        assert sent["tokens"] > 1.1 * once["tokens"]


@pytest.mark.parametrize("name", quick(["alltoall", "deduplicated", "hierarchical"], "hierarchical"))
@pytest.mark.more
def test_rows_that_have_left_are_not_kept(pool: RankPool, name: str) -> None:
    assert pool.run(jobs_dispatch.held_while_experts_compute, name, 2, ranks=4) == [[False]] * 4


@pytest.mark.parametrize(
    ("fold", "ranks", "node_size", "axes_of_rank_1"),
    [
        ("ep4", 4, 2, [(1, 3), (0, 1), (0, 1)]),
        pytest.param("ep4 etp2", 8, 4, [(1, 5), (1, 3), (0, 1, 2, 3)], marks=pytest.mark.more),
        pytest.param("ep8", 8, 2, [(1, 3, 5, 7), (0, 1), (0, 1)], marks=pytest.mark.slow),
    ],
)
@pytest.mark.more
def test_by_node(pool: RankPool, fold: str, ranks: int, node_size: int, axes_of_rank_1: list[tuple[int, ...]]) -> None:
    """Between nodes and then within: the sum of a loop; between nodes a token travels once to each node."""
    found = pool.run(jobs_dispatch.by_node, fold, node_size, KINDS, ranks=ranks)
    assert found[1] == ("HierarchicalDispatcher", axes_of_rank_1)
    assert {name for name, _ in found} == {"HierarchicalDispatcher"}
    for sent in pool.run(jobs_dispatch.rows_between_nodes, fold, node_size, 16, ranks=ranks):
        assert sent["rows"] == sent["pairs"] > 0


@pytest.mark.parametrize(
    ("fold", "ranks", "node_size"), [("ep4", 4, 2), pytest.param("ep8", 8, 4, marks=pytest.mark.slow)]
)
def test_the_planner_expects_what_travels(pool: RankPool, fold: str, ranks: int, node_size: int) -> None:
    """Rows of either step, and the collectives of each."""
    tokens, nodes = 3000, ranks // node_size
    places = (pairs_of(BALANCED, jobs_dispatch.EXPERTS, jobs_dispatch.TOP, n).mean for n in (nodes, ranks))
    to_nodes, to_ranks = (tokens * mean for mean in places)
    seen = pool.run(jobs_dispatch.rows_of_each_step, fold, node_size, tokens, ranks=ranks)
    mean = {step: sum(found[step] for found in seen) / ranks for step in ("between", "within")}
    assert mean["between"] == pytest.approx(to_nodes * (1 - 1 / nodes), rel=0.015)
    assert mean["within"] == pytest.approx(to_ranks * (1 - 1 / node_size), rel=0.015)
    for found in seen:
        assert (found["forward between"], found["forward within"]) == (4, 4)
        assert (found["backward between"], found["backward within"]) == (3, 3)


@pytest.mark.parametrize(
    ("fold", "node_size"), quick([("ep4", 4), ("ep4", 1), ("ep2 etp2", 2), ("ep4", 3)], ("ep4", 3))
)
@pytest.mark.more
def test_where_nodes_do_not_cut_the_group_in_two(pool: RankPool, fold: str, node_size: int) -> None:
    assert pool.run(jobs_dispatch.by_node, fold, node_size, KINDS[:2], ranks=4) == [("DeduplicatedDispatcher", [])] * 4


@st.composite
def routings(draw: st.DrawFn) -> tuple[Tensor, int, Tensor | None]:
    experts = draw(st.integers(1, 6))
    top = draw(st.integers(1, experts))
    tokens = draw(st.integers(0, 9))
    rows = [draw(st.permutations(range(experts)))[:top] for _ in range(tokens)]
    expert = torch.tensor(rows, dtype=torch.int64).view(tokens, top)
    routed = draw(st.none() | st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    return expert, experts, None if routed is None else torch.tensor(routed, dtype=torch.bool)


@given(routings(), st.booleans())
@settings(max_examples=200, deadline=None)
def test_sorting(routing: tuple[Tensor, int, Tensor | None], told: bool) -> None:
    expert, experts, routed = routing
    tokens, top = expert.shape
    kept = [t for t in range(tokens) if routed is None or bool(routed[t])]
    served = len(kept) * top if told else None
    choices = sort_by_expert(expert, experts, None if routed is None else routed.unsqueeze(1), served)
    assert choices.served == (len(kept) * top if told or routed is None else None)
    slots = choices.slot_S[: len(kept) * top]
    sorted_experts = expert.reshape(-1)[slots].tolist()
    assert sorted_experts == sorted(sorted_experts)
    assert choices.counts_E.tolist() == [sorted_experts.count(e) for e in range(experts)]
    assert sorted(slots.tolist()) == [t * top + k for t in kept for k in range(top)]
    copies = Copies.of_choices(choices, len(slots), tokens)
    for e in range(experts):  # ties in token order
        mine = [t for t, x in zip(copies.token_R.tolist(), sorted_experts, strict=True) if x == e]
        assert mine == sorted(mine)
    for row, slot in enumerate(slots.tolist()):
        assert copies.row_TJ.view(-1)[slot] == row


@given(routings())
@settings(max_examples=100, deadline=None)
def test_permute_and_unpermute(routing: tuple[Tensor, int, Tensor | None]) -> None:
    expert, experts, routed = routing
    tokens, top = expert.shape
    kept = None if routed is None else routed.unsqueeze(1)
    choices = sort_by_expert(expert, experts, kept)
    copies = Copies.of_choices(choices, int(choices.counts_E.sum()), tokens)
    x = torch.randn(tokens, 2, dtype=torch.float64, requires_grad=True)
    times = top * (torch.ones(tokens, 1, dtype=torch.float64) if routed is None else routed.double().unsqueeze(1))
    y = unpermute(permute(x, copies), copies)
    torch.testing.assert_close(y, x * times)
    slope = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, x, slope)[0], slope * times)

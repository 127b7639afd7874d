# SPDX-License-Identifier: Apache-2.0
"""Dispatch followed by combine is the plain weighted sum, whatever the routing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_moefold.dispatch.permutation import combine, permute, sort_by_expert
from lightning_moefold.testing import RankPool
from tests.dispatch import jobs

KINDS = ["plain", "uneven", "one rank empty", "all empty", "all to one", "padding", "a rank of padding"]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_round_trip(pool: RankPool, ranks: int) -> None:
    sizes = [n for n in (1, 2, 4) if n <= ranks]
    folds = [f"ep{ep} etp{etp}" for ep in sizes for etp in sizes if ep * etp <= ranks]
    assert pool.run(jobs.check, folds, KINDS, ranks=ranks) == [len(folds) * len(KINDS)] * ranks


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
    order = sort_by_expert(expert, experts, routed, None if routed is None or not told else int(routed.sum()))
    kept = [t for t in range(tokens) if routed is None or bool(routed[t])]
    assert order.rows == len(kept) * top
    sorted_experts = expert.reshape(-1)[order.slot_R].tolist()
    assert sorted_experts == sorted(sorted_experts)
    assert order.counts_E.tolist() == [sorted_experts.count(e) for e in range(experts)]
    assert sorted(order.slot_R.tolist()) == [t * top + k for t in kept for k in range(top)]
    for e in range(experts):  # ties in token order
        mine = [t for t, x in zip(order.token_R.tolist(), sorted_experts, strict=True) if x == e]
        assert mine == sorted(mine)
    for row, slot in enumerate(order.slot_R.tolist()):
        assert order.row_TK.view(-1)[slot] == row


@given(routings())
@settings(max_examples=100, deadline=None)
def test_permute_and_combine_gradients(routing: tuple[Tensor, int, Tensor | None]) -> None:
    expert, experts, routed = routing
    tokens, top = expert.shape
    order = sort_by_expert(expert, experts, routed)
    x = torch.randn(tokens, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(tokens, top, dtype=torch.float64, requires_grad=True)
    keep = torch.ones(tokens, 1, dtype=torch.float64) if routed is None else routed.double().unsqueeze(1)
    y = combine(permute(x, order), weight, order)
    torch.testing.assert_close(y, x * weight.sum(1, keepdim=True) * keep)
    slope = torch.randn_like(y)
    actual = torch.autograd.grad(y, (x, weight), slope)
    torch.testing.assert_close(actual[0], slope * weight.sum(1, keepdim=True) * keep)
    torch.testing.assert_close(actual[1], ((slope * x).sum(1, keepdim=True) * keep).expand(tokens, top))

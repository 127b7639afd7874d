# SPDX-License-Identifier: Apache-2.0
"""Routers that look at whole rows, in one process: against plain loops, and what they promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_moefold.dispatch import DispatchConfig
from lightning_moefold.modules import MoELayer, SwipeOptions, TopologyAwareOptions
from lightning_moefold.modules.routers.rows import best_experts
from lightning_moefold.modules.routers.swipe import SwipeRouter, balanced
from lightning_moefold.modules.routers.topology_aware import TopologyAwareRouter
from lightning_moefold.modules.sequence import SequenceBatch
from tests.modules.routers import naive

D = 6
SHAPES = [  # rows, length, experts, experts per token
    (3, 12, 4, 2),  # L a multiple of E
    (2, 13, 4, 3),
    (2, 3, 8, 2),  # fewer tokens than experts
    (2, 3, 4, 4),  # k = E
    (1, 9, 5, 4),  # k = E - 1: almost every token has to make room
    (4, 1, 6, 3),
    (1, 40, 8, 1),
]


def draw(kind: str, rows: int, length: int, experts: int) -> Tensor:
    """Scores, ``[B, S, E]``."""
    score = torch.rand(rows, length, experts, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return {
        "any": score,
        "skewed": score + torch.linspace(3, 0, experts, dtype=torch.float64),
        "coarse": (score * 3).floor() / 4,  # many ties
        "equal": torch.full_like(score, 0.5),
        "tokens alike": score[:, :1].repeat(1, length, 1),
    }[kind]


def padding(rows: int, length: int) -> Tensor:
    """Which tokens count, ``[B, S]``: padding anywhere, the last row all of it."""
    real = torch.rand(rows, length, generator=torch.Generator().manual_seed(5)) < 0.7
    real[-1] = False
    return real


KINDS = ["any", "skewed", "coarse", "equal", "tokens alike"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_swipe_is_what_loops_do(kind: str, shape: tuple[int, int, int, int], padded: bool) -> None:
    rows, length, experts, k = shape
    score_BSE = draw(kind, rows, length, experts)
    real_BS = padding(rows, length) if padded else torch.ones(rows, length, dtype=torch.bool)
    has_BSE = balanced(score_BSE, real_BS, k)
    assert not has_BSE[~real_BS].any()
    for row in range(rows):
        expected = naive.swipe(score_BSE[row][real_BS[row]].tolist(), k)
        found = [token.nonzero().flatten().tolist() for token in has_BSE[row][real_BS[row]]]
        assert found == [sorted(experts) for experts in expected]
        assert all(len(set(experts)) == k for experts in found)
        tokens = int(real_BS[row].sum())
        assert has_BSE[row].sum(0).max() <= -(-k * tokens // experts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3, 12, 4, 2), (2, 3, 8, 2), (4, 7, 6, 3), (2, 5, 4, 1)], ids=str)
@pytest.mark.parametrize("fraction", [0.0, 0.14, 0.3, 1.0])
def test_topology_aware_is_what_loops_do(kind: str, shape: tuple[int, int, int, int], fraction: float) -> None:
    rows, length, experts, k = shape
    score_BSE, real_BS = draw(kind, rows, length, experts), padding(rows, length)
    options: dict[str, Any] = {"nodes": 2, "far_fraction": fraction, "data_ranks": 4}
    router = TopologyAwareRouter(D, experts, k, TopologyAwareOptions(**options)).double()
    batch = SequenceBatch(rows, length)
    batch.row_numbers, batch.counted_T = range(1, 1 + 3 * rows, 3), real_BS.flatten()
    found = router.choose(score_BSE.flatten(0, 1), batch).view(rows, length, k)
    for row in range(rows):
        number, real_S = 1 + 3 * row, real_BS[row]
        expected = naive.topology_aware(score_BSE[row][real_S].tolist(), k, number, options)
        assert [sorted(token) for token in found[row][real_S].tolist()] == [sorted(token) for token in expected]
        far = found[row][real_S] // (experts // 2) != number % 4 // 2
        assert far.sum() <= fraction * k * real_S.sum()
        plain = score_BSE[row][~real_S].argsort(descending=True, stable=True)[:, :k]
        assert torch.equal(found[row][~real_S], plain)


@pytest.mark.parametrize("make", [
    lambda e, k: SwipeRouter(D, e, k, SwipeOptions(score_function="sigmoid", bias_update_rate=0.0)),
    lambda e, k: TopologyAwareRouter(D, e, k, TopologyAwareOptions(nodes=2, far_fraction=0.2, bias_update_rate=0.0)),
])  # fmt: skip
def test_routers_of_rows(make: Any) -> None:
    """Bias in the choice, not in the weights; padding chooses for itself and is as if it were not there; evaluation is plain."""
    torch.manual_seed(0)
    rows, length, experts, k = 2, 7, 6, 3
    router = make(experts, k).double()
    with torch.no_grad():
        router.weight.normal_()
        router.e_score_correction_bias.normal_(0, 0.3)
    x_BSD = torch.randn(rows, length, D, dtype=torch.float64)
    x_BSD[1, 4] = x_BSD[1, 2]  # a tie
    batch = SequenceBatch(rows, length)
    batch.counted_T = torch.tensor([True] * 5 + [False] * 2 + [False] + [True] * 6)
    routed = router(x_BSD.flatten(0, 1), batch)
    options = router.options.as_dict()
    places = [naive.Place(0, i // length, i % length, bool(c)) for i, c in enumerate(batch.counted_T)]
    bias = router.e_score_correction_bias.tolist()
    scored = [
        naive.score(x, router.weight, options, bias, p, 0, 0) for x, p in zip(x_BSD.flatten(0, 1), places, strict=True)
    ]
    expected = naive.route(scored, places, k, options, norm=True)
    for expert_K, weight_K, token in zip(routed.expert_TK.tolist(), routed.weight_TK, expected, strict=True):
        wanted = dict(zip(token.experts, token.weights, strict=True))
        assert sorted(expert_K) == sorted(token.experts)
        for expert, weight in zip(expert_K, weight_K, strict=True):
            torch.testing.assert_close(weight, wanted[expert], rtol=1e-12, atol=0)
    slope_TE = torch.randn(rows * length, experts, dtype=torch.float64)
    (grad,) = torch.autograd.grad((routed.weight_TK * slope_TE.gather(1, routed.expert_TK)).sum(), router.weight)
    loss = sum((t.weights * slope_TE[i][t.experts]).sum() for i, t in enumerate(expected))
    torch.testing.assert_close(grad, torch.autograd.grad(loss, router.weight)[0], rtol=1e-11, atol=1e-12)

    alone = SequenceBatch(1, 5)
    assert torch.equal(router(x_BSD[0, :5], alone).expert_TK, routed.expert_TK[:5])
    for empty in (SequenceBatch(1, 0), SequenceBatch(0, 1)):
        assert router(x_BSD[:0, 0], empty).expert_TK.shape == (0, k)
    router.eval()
    routed = router(x_BSD.flatten(0, 1), batch)
    choice = routed.logits_TE.sigmoid() if isinstance(router, SwipeRouter) else routed.logits_TE.softmax(-1)
    choice = choice + router.e_score_correction_bias
    assert torch.equal(routed.expert_TK.sort().values, choice.topk(k).indices.sort().values)


@pytest.mark.parametrize("k", [2, 4])  # k = E as well
def test_on_one_node_no_expert_is_far(k: int) -> None:
    router = TopologyAwareRouter(D, 4, k, TopologyAwareOptions(nodes=1, far_fraction=0.0))
    score_TE = draw("coarse", 2, 5, 4).flatten(0, 1)
    assert torch.equal(router.choose(score_TE, SequenceBatch(2, 5)), best_experts(score_TE, k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tokens_that_rounding_tells_apart_are_alike(dtype: torch.dtype) -> None:
    """The first token that is repeated is the same token twice, until cp computes its attention in another order."""
    score_BSE = draw("tokens alike", 1, 9, 6).to(dtype)
    ulps_BSE = torch.randint(-2, 3, score_BSE.shape, generator=torch.Generator().manual_seed(6)).to(dtype)
    noisy_BSE = score_BSE * (1 + torch.finfo(dtype).eps * ulps_BSE)
    assert not torch.equal(noisy_BSE, score_BSE)
    real_BS = torch.ones(1, 9, dtype=torch.bool)
    assert torch.equal(balanced(noisy_BSE, real_BS, 3), balanced(score_BSE, real_BS, 3))
    router = TopologyAwareRouter(D, 6, 3, TopologyAwareOptions(nodes=2, far_fraction=0.2))
    found, expected = (router.choose(x.flatten(0, 1), SequenceBatch(1, 9)) for x in (noisy_BSE, score_BSE))
    assert torch.equal(found, expected)


def test_swipe_needs_no_more_capacity_than_even_shares() -> None:
    """So that a capacity factor of 1 drops nothing, not even from rows whose length the experts do not divide."""
    torch.manual_seed(1)
    layer = MoELayer(D, 8, 3, 4, router="swipe", dispatch=DispatchConfig(capacity_factor=1.0, pad_to_capacity=True))
    with torch.no_grad():
        layer.gate.weight.normal_(0, 2).add_(torch.linspace(2, 0, 8).unsqueeze(1))
    layer(torch.randn(3, 11, D) + 1)
    assert layer.dropped == 0
    assert layer.load_E.sum() == 3 * 11 * 3
    assert layer.load_E.max() <= 3 * 5
    plain = MoELayer(D, 8, 3, 4, dispatch=DispatchConfig(capacity_factor=1.0))
    plain.load_state_dict(layer.state_dict())
    plain(torch.randn(3, 11, D) + 1)
    assert plain.dropped > 0

# SPDX-License-Identifier: Apache-2.0
"""Experts on their rows, against a loop over rows; some experts without rows, tokens read often or never."""

from __future__ import annotations

import dataclasses
import gc
from functools import partial

import pytest
import torch

from lightning_moefold.dispatch import ExpertRows
from lightning_moefold.modules import MoELayer
from lightning_moefold.modules.experts import kernels
from lightning_moefold.modules.experts.kernels import _at_once
from lightning_moefold.modules.experts.products import ExpertProducts, GroupedProducts
from lightning_moefold.modules.mlp import ACTIVATIONS
from tests.modules.experts.expert_cases import COUNTS, by_loop, make_rows

KINDS = ["in order", "permuted", "often or never"]


def _weights(experts: int, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(3)
    shapes = [(experts, 8, 16), (experts, 8, 16), (experts, 16, 8)]
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_expert_by_expert(activation: str, kind: str, counts: list[int]) -> None:
    act = ACTIVATIONS[activation]
    tokens, rows = make_rows(counts, kind)
    x = torch.randn(tokens, 16, dtype=torch.float64, requires_grad=True)
    weight = rows.weight_M.requires_grad_()
    inputs = [x, weight, *_weights(len(counts), torch.float64)]
    actual = kernels.gated_experts(x, rows, act, *inputs[2:])
    expected = by_loop(x, rows, act, *inputs[2:])
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    slope = torch.randn_like(expected)
    found = torch.autograd.grad(actual, inputs, slope)
    if not sum(counts):
        assert all(not g.any() for g in found)
        return
    for a, b in zip(found, torch.autograd.grad(expected, inputs, slope), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_with_many_rows(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes some of them at a time; 16-bit numbers are summed in one product all the same."""
    tokens, rows = make_rows([0, 9, 4, 0, 2], kind)
    outcomes: dict[torch.dtype, list[list[torch.Tensor]]] = {torch.float64: [], torch.bfloat16: []}
    for most in (2, 4, 1024):
        monkeypatch.setattr(kernels, "ROWS_AT_A_TIME", most)
        for dtype, found in outcomes.items():
            torch.manual_seed(1)
            x = torch.randn(tokens, 16, dtype=torch.float64).to(dtype).requires_grad_()
            inputs = [x, rows.weight_M.requires_grad_(), *_weights(5, dtype)]
            y = kernels.gated_experts(x, rows, ACTIVATIONS["silu"], *inputs[2:])
            found.append([y.detach(), *torch.autograd.grad(y.square().sum(), inputs)])
    for dtype, (*parts, whole) in outcomes.items():
        for part in parts:
            for a, b in zip(part, whole, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0 if dtype == torch.bfloat16 else 1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_at_once(dtype: torch.dtype, kind: str) -> None:
    """The way that a GPU takes is the same."""
    tokens, rows = make_rows(COUNTS[0], kind)
    rows = dataclasses.replace(rows, weight_M=rows.weight_M.float().requires_grad_())
    x = torch.randn(tokens, 16).to(dtype).requires_grad_()
    inputs = [x, rows.weight_M, *_weights(6, dtype)]
    silu = ACTIVATIONS["silu"]
    outcomes = []
    ways = GroupedProducts(rows.counts_L), ExpertProducts(COUNTS[0])
    for run in (kernels.gated_experts, *(partial(_at_once, products=products) for products in ways)):
        y = run(x, rows, silu, *inputs[2:])
        outcomes.append([y, *torch.autograd.grad(y.float().square().sum(), inputs)])
    for exact, *found in zip(*outcomes, strict=True):
        size = float(exact.detach().float().abs().max())
        for each in found:
            torch.testing.assert_close(each, exact, rtol=2e-2, atol=(2e-2 if dtype == torch.bfloat16 else 1e-4) * size)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2, 3, 4), (0, 1, 2, 4)])
def test_only_what_is_asked_for_has_a_gradient(frozen: tuple[int, ...]) -> None:
    tokens, rows = make_rows(COUNTS[0], "often or never")
    x = torch.randn(tokens, 16, dtype=torch.float64, requires_grad=True)
    inputs = [x, rows.weight_M.requires_grad_(), *_weights(6, torch.float64)]
    silu = ACTIVATIONS["silu"]
    whole = torch.autograd.grad(kernels.gated_experts(x, rows, silu, *inputs[2:]).square().sum(), inputs)
    for i in frozen:
        inputs[i].requires_grad_(False)
    kept = [i for i in range(len(inputs)) if i not in frozen]
    y = kernels.gated_experts(x, ExpertRows(rows.token_M, inputs[1], rows.counts_L, False), silu, *inputs[2:])
    for i, grad in zip(kept, torch.autograd.grad(y.square().sum(), [inputs[i] for i in kept]), strict=True):
        torch.testing.assert_close(grad, whole[i])


def test_memory_kept_for_backward() -> None:
    """``A * D + 2 * M * F`` numbers in the experts, and of the router and the indices a few per token and expert."""
    tokens, hidden, width, experts, top_k = 512, 64, 96, 8, 2
    layer = MoELayer(hidden, experts, top_k, width)
    x = torch.randn(1, tokens, hidden, requires_grad=True)
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    gc.collect()
    promised = 4 * (tokens * hidden + 2 * tokens * top_k * width)
    assert promised <= sum(kept.values()) <= promised + tokens * (experts * 3 + top_k * 12) * 8
    assert y.requires_grad

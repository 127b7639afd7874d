# SPDX-License-Identifier: Apache-2.0
"""Adapters of experts on their rows, both ways, against a loop over rows with ``W + s B A`` in the place of W."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_moefold.modules.experts import kernels
from lightning_moefold.modules.experts.kernels import ExpertLoRA, _at_once, gated_experts
from lightning_moefold.modules.experts.products import ExpertProducts, GroupedProducts
from lightning_moefold.modules.mlp import ACTIVATIONS
from tests.modules.experts.expert_cases import COUNTS, by_loop, make_rows

SCALE = 1.5
SILU = ACTIVATIONS["silu"]


def stacks(experts: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Gate, up, down, and the five of an adapter of rank 8, and 16 of what gate and up share."""
    torch.manual_seed(3)
    shapes = [(24, 16), (24, 16), (16, 24), (16, 16), (24, 16), (24, 16), (8, 24), (16, 8)]
    return [torch.randn(experts, *shape, dtype=torch.float64).mul_(0.5).to(dtype).requires_grad_() for shape in shapes]


def materialised(x: Tensor, rows: object, *tensors: Tensor) -> Tensor:
    gate, up, down, a, gate_b, up_b, down_a, down_b = tensors
    return by_loop(
        x, rows, SILU, gate + SCALE * gate_b @ a, up + SCALE * up_b @ a, down + SCALE * down_b @ down_a
    )  # fmt: skip


@pytest.mark.parametrize("frozen", [(), (2, 3, 4), (0, 2, 3, 4), (2, 3, 4, 5, 8), (2, 3, 4, 5, 6, 7, 8, 9)], ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("way", ["one by one", "few rows at a time", "at once"])
def test_both_ways(way: str, counts: list[int], frozen: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "few rows at a time":
        monkeypatch.setattr(kernels, "ROWS_AT_A_TIME", 2)
    tokens, rows = make_rows(counts, "often or never")
    inputs = [torch.randn(tokens, 16, dtype=torch.float64, requires_grad=True), rows.weight_M.requires_grad_()]
    inputs += stacks(len(counts))
    for number in frozen:
        inputs[number].requires_grad_(False)
    x, weights = inputs[0], inputs[2:]
    if way == "at once":
        actual = _at_once(x, rows, SILU, *weights, products=ExpertProducts(counts), scale=SCALE)
    else:
        actual = gated_experts(x, rows, SILU, *weights[:3], lora=ExpertLoRA(*weights[3:], SCALE))
    expected = materialised(x, rows, *weights)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    slope = torch.randn_like(expected)
    asked = [t for t in inputs if t.requires_grad]
    found = torch.autograd.grad(actual, asked, slope)
    if not sum(counts):
        assert not any(bool(g.any()) for g in found)
        return
    for a, b in zip(found, torch.autograd.grad(expected, asked, slope), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products(dtype: torch.dtype) -> None:
    """The way that a GPU takes, in the precisions it has there."""
    tokens, rows = make_rows(COUNTS[0], "permuted")
    rows = dataclasses.replace(rows, weight_M=rows.weight_M.float().requires_grad_())
    x, weights = torch.randn(tokens, 16).to(dtype).requires_grad_(), stacks(6, dtype)
    outcomes = []
    ways = (GroupedProducts(rows.counts_L), ExpertProducts(COUNTS[0]))
    lora = ExpertLoRA(*weights[3:], SCALE)
    runs = [partial(gated_experts, x, rows, SILU, *weights[:3], lora=lora)]
    runs += [partial(_at_once, x, rows, SILU, *weights, products=products, scale=SCALE) for products in ways]
    for run in runs:
        y = run()
        outcomes.append([y, *torch.autograd.grad(y.float().square().sum(), [x, rows.weight_M, *weights])])
    for exact, *found in zip(*outcomes, strict=True):
        size = float(exact.detach().float().abs().max())
        for each in found:
            torch.testing.assert_close(each, exact, rtol=3e-2, atol=(3e-2 if dtype == torch.bfloat16 else 1e-4) * size)


def test_no_delta_is_made_and_no_gradient_of_the_base() -> None:
    sizes: set[tuple[int, ...]] = set()

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            made = func(*args, **(kwargs or {}))
            sizes.update(
                tuple(t.shape) for t in (made if isinstance(made, tuple) else (made,)) if isinstance(t, Tensor)
            )
            return made

    counts = [3, 0, 2]
    tokens, rows = make_rows(counts, "permuted")
    base = [torch.randn(3, *shape, dtype=torch.float64) for shape in ((24, 16), (24, 16), (16, 24))]
    shapes = ((6, 16), (24, 6), (24, 6), (5, 24), (16, 5))
    adapter = [torch.randn(3, *shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    x = torch.randn(tokens, 16, dtype=torch.float64, requires_grad=True)
    with Sizes():
        y = gated_experts(x, rows, SILU, *base, lora=ExpertLoRA(*adapter, SCALE))
        views = sizes.copy()  # of the weights, where an expert's is taken
        sizes.clear()
        y.sum().backward()
    whole = {(3, 24, 16), (3, 16, 24)}
    assert not whole & (views | sizes)
    assert all(a.grad is not None and bool(a.grad[0].any()) and not a.grad[1].any() for a in adapter)

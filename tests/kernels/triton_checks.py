# SPDX-License-Identifier: Apache-2.0
"""Triton's kernels against PyTorch's operations in float64; for Triton's interpreter, and for a CUDA device.

``test_triton.py`` runs this file by itself with ``TRITON_INTERPRET=1``, which must be set before Triton is first imported;
``tests/gpu`` runs it on the device.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_moefold import kernels
from lightning_moefold.kernels.dropout import drop_by
from lightning_moefold.kernels.noise import uniform

FLOAT32 = pytest.param(torch.float32, marks=pytest.mark.more)
DTYPES = [FLOAT32, torch.bfloat16]
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@pytest.fixture(autouse=True)
def _kernels_run() -> None:
    assert kernels.runs_triton(torch.zeros(1, device=DEVICE))


def _draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def _close(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    bound = 1e-2 if dtype == torch.bfloat16 else 1e-5
    assert float((found.double() - exact).abs().max()) <= bound * float(exact.abs().max().clamp(min=1e-6))


def _gradients(function: Callable[..., Tensor], inputs: list[Tensor], slope: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, slope.to(y.dtype))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(
    "shape",
    [(3, 5), (0, 8), pytest.param((7, 2500), marks=pytest.mark.more), pytest.param((2, 16), marks=pytest.mark.more)],
)
def test_gated(shape: tuple[int, int], weighted: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs = [_draw(*shape, dtype=dtype), _draw(*shape, dtype=dtype)]
    if weighted:
        inputs.append(torch.rand(shape[0], device=DEVICE))
    slope = _draw(*shape)

    def exact(gate: Tensor, up: Tensor, weight: Tensor | None = None) -> Tensor:
        return F.silu(gate) * up * (1 if weight is None else weight.unsqueeze(1))

    found = _gradients(lambda *x: kernels.gated(F.silu, *x), inputs, slope)
    wanted = _gradients(exact, [x.double() for x in inputs], slope.to(dtype))
    for a, b, like in zip(found, wanted, [inputs[0], *inputs], strict=True):
        assert a.shape == b.shape
        if b.numel():
            _close(a, b, like.dtype)


def test_gated_makes_the_inner_again_and_writes_where_it_may() -> None:
    torch.manual_seed(0)
    gate, up, weight, grad = _draw(4, 9), _draw(4, 9), torch.rand(4, device=DEVICE), _draw(4, 9)
    kept = grad.clone()
    first = kernels.gated_backward(F.silu, gate, up, weight, grad, owns_grad=False, wants_inner=True)
    assert torch.equal(grad, kept)
    assert first.weight_M is None
    assert first.inner_MF is not None
    _close(first.inner_MF, (F.silu(gate) * up * weight.unsqueeze(1)).double(), torch.float32)
    second = kernels.gated_backward(F.silu, gate, up, weight, grad, owns_grad=True)
    assert second.gate_MF.data_ptr() == grad.data_ptr()
    assert second.inner_MF is None
    assert torch.equal(first.gate_MF, second.gate_MF)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 24, pytest.param(1500, marks=pytest.mark.more)])
def test_sum_of_copies(width: int, dtype: torch.dtype) -> None:
    """Tokens with all their rows, with some, and with none."""
    torch.manual_seed(0)
    x_RD, rows = _draw(9, width, dtype=dtype), 9
    row_TJ = torch.tensor([[0, 5, 2], [9, 9, 9], [8, 9, 1], [3, 4, 9]], device=DEVICE)
    padded = torch.cat((x_RD.double(), torch.zeros(1, width, dtype=torch.float64, device=DEVICE)))
    _close(kernels.sum_of_copies(x_RD, row_TJ, False), padded[row_TJ].sum(1), dtype)
    whole_TJ = torch.randperm(rows, device=DEVICE).view(3, 3)
    _close(kernels.sum_of_copies(x_RD, whole_TJ, True), padded[whole_TJ].sum(1), dtype)
    nothing = kernels.sum_of_copies(x_RD[:0], torch.zeros(2, 3, dtype=torch.int64, device=DEVICE), False)
    assert not nothing.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_of_tokens(dtype: torch.dtype) -> None:
    """Any number of rows a token, none among them, in any order; the same bits twice."""
    torch.manual_seed(0)
    token_R = torch.tensor([3, 0, 3, 3, 5, 0, 3], device=DEVICE)
    x_RD = _draw(7, 40, dtype=dtype)
    exact = torch.zeros(7, 40, dtype=torch.float64, device=DEVICE).index_add_(0, token_R, x_RD.double())
    found = kernels.sum_of_tokens(x_RD, token_R, 7)
    _close(found, exact, dtype)
    assert torch.equal(found, kernels.sum_of_tokens(x_RD, token_R, 7))
    assert not kernels.sum_of_tokens(x_RD[:0], token_R[:0], 3).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "tables"), [(2, 2), (3, 1)])
@pytest.mark.parametrize(
    ("heads", "size"), [(3, 6), pytest.param(4, 16, marks=pytest.mark.more), pytest.param(1, 2, marks=pytest.mark.more)]
)
def test_rotate(heads: int, size: int, rows: int, tables: int, dtype: torch.dtype) -> None:
    """Heads inside a wider product (not contiguous), tables for each row or for all."""
    torch.manual_seed(0)
    wide = _draw(rows, 5, heads * size + 7, dtype=dtype)
    x = wide[..., : heads * size].view(rows, 5, heads, size)
    angle = torch.rand(tables, 5, size // 2, device=DEVICE) * 6
    cos, sin, slope = angle.cos().to(dtype), angle.sin().to(dtype), _draw(rows, 5, heads, size, dtype=dtype)

    def exact(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        c, s = cos.double().unsqueeze(2), sin.double().unsqueeze(2)
        return torch.cat((first * c - second * s, second * c + first * s), -1)

    leaf = x.detach().requires_grad_()
    found = kernels.rotate(leaf, cos, sin)
    _close(found.detach(), exact(x.double()), dtype)
    (grad,) = torch.autograd.grad(found, leaf, slope)
    _close(grad, _gradients(exact, [x.double()], slope)[1], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 33, pytest.param(5000, marks=pytest.mark.more)])
def test_softmax(size: int, dtype: torch.dtype) -> None:
    """Statistics and slope of rows whose target is here, or on another rank."""
    torch.manual_seed(0)
    logits, scale = _draw(4, size, dtype=dtype) * 5, torch.rand(4, device=DEVICE)
    target = torch.tensor([0, size - 1, -3, size + 2], device=DEVICE)
    exact = logits.double()
    held = torch.tensor([True, True, False, False], device=DEVICE)
    found, kept = kernels.row_statistics(logits.clone(), target, torch.float32)
    assert torch.equal(found[0].double(), exact.amax(-1))
    _close(found[1], (exact - exact.amax(-1, keepdim=True)).exp().sum(-1), torch.float32)
    picked = exact.gather(1, target.clamp(0, size - 1).unsqueeze(1)).squeeze(1) * held
    assert torch.equal(found[2].double(), picked)
    log_sum = exact.logsumexp(-1) + 0.5  # other ranks hold more of the vocabulary
    one = F.one_hot(target.clamp(0, size - 1), size) * held.unsqueeze(1)
    wanted = scale.double().unsqueeze(1) * ((exact - log_sum.unsqueeze(1)).exp() - one)
    slope = kernels.softmax_slope(kept, target, found[0], log_sum.float(), scale)
    _close(slope, wanted, dtype)
    assert slope.data_ptr() == kept.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(5, 33), (0, 8), (3, 1), pytest.param(4, 2500, marks=pytest.mark.more)])
def test_dropout(tokens: int, width: int, dtype: torch.dtype) -> None:
    """Forward and backward to the bits of PyTorch's operations, also for a cut input; infinity is not hidden."""
    torch.manual_seed(0)
    x = _draw(tokens, width, dtype=dtype)
    x.flatten()[:2] = float("inf")
    key = torch.randint(-(2**63), 2**63 - 1, (tokens,), device=DEVICE)
    slope = _draw(tokens, width, dtype=dtype)
    for probability, first in ((0.1, 0), (0.05, 7), (0.0, 0), (0.75, 1 << 20)):
        found = _gradients(lambda x, p=probability, f=first: drop_by(x, key, p, f), [x], slope)
        kept = uniform(key, width, torch.float32, first) >= probability
        scale = 1 / (1 - probability)
        for mine, expected in zip(found, (x * kept * scale, slope * kept * scale), strict=True):
            mine, expected = mine.nan_to_num(-9.0, 9.0), expected.nan_to_num(-9.0, 9.0)
            if dtype == torch.bfloat16 and DEVICE == "cpu":  # the interpreter cuts where a device rounds
                assert torch.equal(mine == 0, expected == 0)
                torch.testing.assert_close(mine, expected, rtol=2**-7, atol=0)
            else:
                assert torch.equal(mine, expected)


def test_no_triton_where_it_cannot_run() -> None:
    """float64, and tensors that are not real."""
    assert not kernels.runs_triton(torch.zeros(1, dtype=torch.float64, device=DEVICE))
    assert not kernels.runs_triton(torch.zeros(1, device="meta"))

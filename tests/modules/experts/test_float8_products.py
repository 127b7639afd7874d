# SPDX-License-Identifier: Apache-2.0
"""Products in FP8 against a loop that rounds to FP8 by itself, and what the CUDA kernel would be given."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_moefold import Fold
from lightning_moefold.modules import Experts
from lightning_moefold.modules.experts import float8_products as float8
from lightning_moefold.modules.experts.float8_products import Float8Products, check_float8, to_float8
from lightning_moefold.modules.experts.kernels import gated_experts
from lightning_moefold.modules.mlp import ACTIVATIONS
from tests.modules.experts.expert_cases import make_rows

COUNTS = [7, 0, 1, 24]
HIDDEN, WIDTH = 32, 48
CPU = torch.device("cpu")


def _rounded(x: Tensor) -> Tensor:
    """Each row to E4M3 by its largest value, by the definition of the format: three bits after the leading one."""
    result = torch.zeros_like(x, dtype=torch.float64)
    for row, out in zip(x.double().reshape(-1, x.shape[-1]), result.view(-1, x.shape[-1]), strict=True):
        scale = 1.0
        largest = float(row.abs().max())
        while largest / scale > 448:
            scale *= 2
        while largest and largest / (scale / 2) <= 448:
            scale /= 2
        for i, value in enumerate((row / scale).tolist()):
            exponent = max(torch.frexp(torch.tensor(abs(value), dtype=torch.float64)).exponent.item() - 1, -6)
            step = 2.0 ** (exponent - 3)
            out[i] = round(value / step) * step * scale  # Python rounds halves to even, as the cast does
    return result


def _experts(counts: list[int]) -> list[slice]:
    ends = torch.tensor(counts).cumsum(0).tolist()
    return [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]


def test_rounding() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 40) * torch.tensor([1e-6, 1e-3, 1.0, 300.0, 1e6, 0.0]).unsqueeze(1)
    number, scale = to_float8(x)
    assert number.dtype == torch.float8_e4m3fn
    assert torch.equal(torch.frexp(scale).mantissa, torch.full((6,), 0.5))  # powers of two
    assert torch.equal(number.double() * scale.double().unsqueeze(1), _rounded(x))
    assert float((number.float().abs().amax(1)[:5]).min()) > 200  # the range is used


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_has_the_bits_of_a_copy_in_float32(dtype: torch.dtype) -> None:
    """Of rows of all magnitudes, numbers below the normal ones and zeros included, read along and across."""
    torch.manual_seed(0)
    x = (torch.randn(40, 16, 24) * torch.logspace(-44, 38, 40).view(-1, 1, 1)).to(dtype)
    x = x.where(x.isfinite(), 0)
    for rows in (x, x.transpose(1, 2)):
        number, scale = to_float8(rows)
        wide = rows.float()
        share = wide.abs().amax(-1) / 448
        assert torch.equal(scale, torch.ldexp(torch.ones_like(share), torch.frexp(share).exponent))
        expected = (wide / scale.unsqueeze(-1)).to(torch.float8_e4m3fn)
        assert torch.equal(number.view(torch.uint8), expected.view(torch.uint8))
        assert number.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products(dtype: torch.dtype) -> None:
    """Forward and the gradient of rows from rounded factors, the gradient of weights from unrounded ones."""
    torch.manual_seed(0)
    x, grad = torch.randn(32, HIDDEN).to(dtype), torch.randn(32, WIDTH).to(dtype)
    w = torch.randn(4, WIDTH, HIDDEN).to(dtype)
    products = Float8Products(torch.tensor(COUNTS))
    y, grad_x, grad_w = products.forward(x, w), products.input_gradient(grad, w), products.weight_gradient(grad, x, w)
    twice = products.input_gradient(grad, w, grad_x.clone())
    bound = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 0.1}
    for expert, rows in enumerate(_experts(COUNTS)):
        exact = _rounded(x[rows]) @ _rounded(w[expert]).t() if COUNTS[expert] else torch.zeros(0, WIDTH).double()
        torch.testing.assert_close(y[rows].double(), exact, **bound)
        if COUNTS[expert]:
            exact = _rounded(grad[rows]) @ _rounded(w[expert].t()).t()
            torch.testing.assert_close(grad_x[rows].double(), exact, **bound)
        torch.testing.assert_close(grad_w[expert].double(), grad[rows].double().t() @ x[rows].double(), **bound)
    torch.testing.assert_close(twice, 2 * grad_x)


@pytest.mark.parametrize("kind", ["in order", "permuted", "often or never"])
def test_experts(kind: str) -> None:
    """A whole layer of experts, forward and every gradient, within what three bits can do, and not exactly."""
    torch.manual_seed(0)
    tokens, rows = make_rows(COUNTS, kind)
    weight = rows.weight_M.float().requires_grad_()
    rows = type(rows)(rows.token_M, weight, rows.counts_L, rows.distinct, rows.counts)
    x = torch.randn(tokens, HIDDEN, requires_grad=True)
    shapes = (4, WIDTH, HIDDEN), (4, WIDTH, HIDDEN), (4, HIDDEN, WIDTH)
    stacks = [(torch.randn(shape) / shape[-1] ** 0.5).requires_grad_() for shape in shapes]
    inputs, silu = [x, weight, *stacks], ACTIVATIONS["silu"]
    slope = torch.randn(tokens, HIDDEN)
    results = []
    for kernel in ("fp8", "loop"):
        y = gated_experts(x, rows, silu, *stacks, kernel=kernel)
        results.append([y, *torch.autograd.grad(y, inputs, slope)])
    for found, exact in zip(*results, strict=True):
        error = float((found - exact).detach().norm() / exact.detach().norm())
        assert 1e-3 < error < 0.12


def test_no_rows_at_all() -> None:
    tokens, rows = make_rows([0, 0], "in order")
    stacks = [torch.randn(2, 16, 16, requires_grad=True) for _ in range(3)]
    y = gated_experts(torch.zeros(tokens, 16), rows, F.silu, *stacks, kernel="fp8")
    assert y.shape == (0, 16)
    assert all(not g.any() for g in torch.autograd.grad(y.sum(), stacks))


@pytest.mark.parametrize("transposed", [False, True])
def test_what_the_cuda_kernel_is_given(transposed: bool) -> None:
    """PyTorch's own checks of dtypes, strides, scales and offsets pass: its kernel for shapes alone makes them too."""
    x = torch.randn(32, WIDTH if transposed else HIDDEN, dtype=torch.bfloat16)
    w = torch.randn(4, WIDTH, HIDDEN, dtype=torch.bfloat16)
    (x8, scale_x), (w8, scale_w) = to_float8(x), to_float8(w.transpose(1, 2) if transposed else w)
    ends = Float8Products(torch.tensor(COUNTS)).ends_L
    y = float8._scaled_product(*(t.to("meta") for t in (x8, w8, scale_x, scale_w, ends)))
    assert y.shape == (32, HIDDEN if transposed else WIDTH)
    assert y.dtype == torch.bfloat16
    with pytest.raises(RuntimeError):  # the checks are there
        float8._scaled_product(*(t.to("meta") for t in (x8, w8, scale_x, scale_w[0], ends)))


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Experts(32, 4, 40)
    layer.kernel = "fp8"
    with pytest.raises(ValueError, match="multiples of 16, and ffn_hidden_size is 40 on a rank"):
        layer.check_kernel("fp8", Fold(1), torch.bfloat16, CPU)
    fitting = Experts(32, 4, 48)
    fitting.kernel = "fp8"
    fitting.check_kernel("fp8", Fold(1), torch.bfloat16, CPU)
    with pytest.raises(ValueError, match="ffn_hidden_size is 24"):
        fitting.check_kernel("fp8", Fold(2, expert_tensor_parallel_size=2), torch.bfloat16, CPU)
    with pytest.raises(ValueError, match="float64"):
        fitting.check_kernel("fp8", Fold(1), torch.float64, CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    with pytest.raises(ValueError, match="NVIDIA A100 has 8.0"):
        check_float8({}, torch.bfloat16, torch.device("cuda"))
    assert float8.MULTIPLE == 16

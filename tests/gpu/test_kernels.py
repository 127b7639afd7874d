# SPDX-License-Identifier: Apache-2.0
"""Fused kernels on a CUDA device: each against PyTorch's operations in float64, and the paths that choose them.

The default device stays the CPU, as in a training run, so that a tensor that is made in the wrong place is noticed.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from lightning_moefold import kernels
from lightning_moefold.kernels.float32 import exact_linear
from lightning_moefold.modules import Attention, RMSNorm
from lightning_moefold.modules.routers.statistics import sum_of_groups
from lightning_moefold.modules.sequence import SequenceBatch
from tests.kernels.triton_checks import (  # noqa: F401
    test_dropout,
    test_gated,
    test_gated_makes_the_inner_again_and_writes_where_it_may,
    test_no_triton_where_it_cannot_run,
    test_rotate,
    test_softmax,
    test_sum_of_copies,
    test_sum_of_tokens,
)
from tests.modules.attention import one_device
from tests.modules.attention.one_device import relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_triton_is_there() -> None:
    """So that none of the tests above compares PyTorch's operations with themselves."""
    assert kernels.runs_triton(torch.zeros(1, device="cuda"))


def test_two_runs_agree_in_every_bit() -> None:
    """Sums of rows per token, for which CUDA's own ``index_add_`` takes the order in which threads arrive."""
    torch.manual_seed(0)
    x = torch.randn(20000, 256, dtype=torch.bfloat16, device="cuda")
    token = torch.randint(0, 50, (20000,), device="cuda")
    sums = [kernels.sum_of_tokens(x, token, 50) for _ in range(4)]
    assert all(torch.equal(sums[0], other) for other in sums[1:])


def test_sums_of_groups_have_the_same_bits_in_every_run() -> None:
    x_TE, group_T = torch.rand(65536, 64), torch.randint(4, (65536,))
    sums = [sum_of_groups(x_TE, group_T, 4) for _ in range(5)]
    assert all(torch.equal(again, sums[0]) for again in sums[1:])
    assert relative_error(sums[0], torch.zeros(4, 64, dtype=torch.float64).index_add_(0, group_T, x_TE.double())) < 1e-5


@pytest.mark.parametrize("precision", ["highest", "high", "medium", "newer setting"])
def test_a_router_is_exact_whatever_is_allowed_elsewhere(precision: str) -> None:
    """In TF32 the error would be a thousand times as large; afterwards the setting is as it was."""
    torch.manual_seed(0)
    x, w = (torch.randn(n, 4096, device="cuda", requires_grad=True) for n in (512, 64))
    legacy, newer = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.fp32_precision
    exact = x.double() @ w.double().t()
    slope = torch.randn(512, 64, device="cuda")
    grads = torch.autograd.grad(exact, (x, w), slope.double())
    try:
        if precision == "newer setting":
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        else:
            torch.set_float32_matmul_precision(precision)
        before = torch.backends.cuda.matmul.fp32_precision
        found = exact_linear(x, w)
        errors = [relative_error(found, exact)]
        errors += [relative_error(a, b) for a, b in zip(torch.autograd.grad(found, (x, w), slope), grads, strict=True)]
        assert torch.backends.cuda.matmul.fp32_precision == before
        rounded = relative_error(x.detach() @ w.detach().t(), exact)
    finally:
        torch.backends.cuda.matmul.fp32_precision = newer
        torch.set_float32_matmul_precision(legacy)
    assert max(errors) < 3e-6
    assert (rounded > 1e-5) == (precision != "highest")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_norm(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(192, 1e-5).to("cuda", dtype)
    norm.weight.data.normal_()
    x, slope = (torch.randn(7, 5, 192, dtype=dtype, device="cuda") for _ in range(2))
    x.requires_grad_()
    wide, weight = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    exact = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight
    found = norm(x)
    pairs = [(found, exact)]
    pairs += zip(
        torch.autograd.grad(found, (x, norm.weight), slope),
        torch.autograd.grad(exact, (wide, weight), slope.double()),
        strict=True,
    )
    bound = {torch.bfloat16: 1e-2, torch.float32: 1e-6, torch.float64: 1e-12}[dtype]
    for a, b in pairs:
        assert a.dtype == dtype
        assert relative_error(a, b) < bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("kind", "window"), list(itertools.product(["causal", "documents", "left", "hole"], [None, 70]))
)
def test_attention_branches(kind: str, window: int | None, dtype: torch.dtype) -> None:
    """Whichever kernel a shape, a mask and a dtype lead to, with grouped heads; outputs and gradients of real tokens."""
    torch.manual_seed(0)
    rows, length, heads, groups, size = 2, 200, 6, 2, 64
    attention = Attention(heads * size, heads, groups, sliding_window=window).to("cuda", dtype)
    batch = SequenceBatch(rows, length)
    real = torch.ones(rows, length, dtype=torch.bool, device="cuda")
    position = torch.arange(length, device="cuda")
    seen = (position[:, None] >= position) & (position[:, None] - position < (window or length))
    seen = seen.expand(rows, 1, length, length)
    if kind == "documents":
        batch.document_BS = (torch.rand(rows, length, device="cuda") < 0.03).cumsum(1)
        seen = seen & (batch.document_BS[:, None, :, None] == batch.document_BS[:, None, None, :])
    elif kind in ("left", "hole"):
        real[0, : 50 if kind == "left" else 0] = False
        real[1, 60:80] = kind == "left"
        batch.real_BS = real
        seen = seen & real[:, None, None]
        seen = seen | (~seen.any(-1, keepdim=True) & torch.eye(length, dtype=torch.bool, device="cuda"))
    like = {"dtype": dtype, "device": "cuda"}
    q, k, v = (torch.randn(rows, length, h, size, **like, requires_grad=True) for h in (heads, groups, groups))
    slope = torch.randn(rows, length, heads, size, **like) * real[..., None, None]
    found = attention._attend(q, k, v, batch).view(rows, length, heads, size)
    exact = one_device.naive(q, k, v, seen)
    grads = torch.autograd.grad(found, (q, k, v), slope), torch.autograd.grad(exact, (q, k, v), slope.double())
    bound = 2e-2 if dtype == torch.bfloat16 else 1e-5
    assert relative_error(found[real], exact[real]) < bound
    assert all(relative_error(a, b) < bound for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "window"), list(itertools.product(["documents", "left"], [None, 9, 70])))
def test_attention_to_the_keys_of_other_ranks(kind: str, window: int | None, dtype: torch.dtype, groups: int) -> None:
    sizes = {"length": 200, "heads": 6, "kv_heads": 2, "size": 64, "groups": groups}
    assert max(one_device.errors(kind, window, dtype, torch.device("cuda"), **sizes)) < 2e-2


def test_swiglu_of_a_wide_layer() -> None:
    """A width beyond one block of the kernel, at the size of a model."""
    torch.manual_seed(0)
    like = {"dtype": torch.bfloat16, "device": "cuda"}
    gate, up = (torch.randn(512, 20480, **like, requires_grad=True) for _ in range(2))
    slope = torch.randn(512, 20480, **like)
    found = kernels.gated(F.silu, gate, up)
    wide = [x.detach().double().requires_grad_() for x in (gate, up)]
    exact = F.silu(wide[0]) * wide[1]
    for a, b in zip(
        [found, *torch.autograd.grad(found, (gate, up), slope)],
        [exact, *torch.autograd.grad(exact, wide, slope.double())],
        strict=True,
    ):
        assert relative_error(a, b) < 1e-2

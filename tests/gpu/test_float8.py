# SPDX-License-Identifier: Apache-2.0
"""Rounding to FP8 on CUDA, and its kernel, against the same numbers on the CPU. Skipped where there is no CUDA device."""

from __future__ import annotations

import pytest
import torch

from lightning_moefold.modules.experts.float8_products import Float8Products, to_float8

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rounding_is_that_of_the_cpu(dtype: torch.dtype, transposed: bool) -> None:
    """To the bit, for rows of all magnitudes; with no copy beside the numbers, the largest of which would be in float32."""
    torch.manual_seed(0)
    x = (torch.randn(64, 256, 512) * torch.logspace(-30, 30, 64).view(-1, 1, 1)).to(dtype)
    x[5] = 0
    x, on_device = (y.transpose(1, 2) if transposed else y for y in (x, x.cuda()))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    number, scale = to_float8(on_device)
    assert torch.cuda.max_memory_allocated() - before < 1.5 * x.numel()
    exact, exact_scale = to_float8(x)
    assert torch.equal(number.cpu().view(torch.uint8), exact.view(torch.uint8))
    assert torch.equal(scale.cpu(), exact_scale)


def test_products_are_those_of_the_cpu() -> None:
    """The grouped kernel multiplies what the CPU multiplies in float32; experts without rows have none."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("FP8 needs a GPU of compute capability 9.0 or newer")
    torch.manual_seed(0)
    counts = torch.tensor([7, 0, 1, 24])
    x, grad = torch.randn(32, 256).bfloat16(), torch.randn(32, 128).bfloat16()
    w = torch.randn(4, 128, 256).bfloat16()
    exact, found = Float8Products(counts), Float8Products(counts.cuda())
    for name, row in (("forward", x), ("input_gradient", grad)):
        y, y_exact = getattr(found, name)(row.cuda(), w.cuda()), getattr(exact, name)(row, w)
        assert float((y.cpu().float() - y_exact.float()).norm() / y_exact.float().norm()) < 1e-2, name

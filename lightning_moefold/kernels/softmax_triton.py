# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for :mod:`.softmax`: one program per row loops over blocks of columns and computes in float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


def statistics(logits_Cv: Tensor, target_C: Tensor) -> Tensor:
    """See :func:`.softmax.row_statistics`."""
    rows, size = logits_Cv.shape
    found_3C = torch.empty(3, rows, dtype=torch.float32, device=logits_Cv.device)
    if rows:
        _statistics[rows,](logits_Cv, target_C, found_3C, rows, size, BLOCK=min(_BLOCK, triton.next_power_of_2(size)))
    return found_3C


def slope_(logits_Cv: Tensor, target_C: Tensor, log_sum_C: Tensor, scale_C: Tensor) -> Tensor:
    """See :func:`.softmax.softmax_slope`; in place."""
    rows, size = logits_Cv.shape
    if rows:
        block = min(_BLOCK, triton.next_power_of_2(size))
        _slope[rows, triton.cdiv(size, block)](logits_Cv, target_C, log_sum_C, scale_C, size, BLOCK=block)
    return logits_Cv


@triton.jit
def _statistics(logits, target, found, rows, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    top = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    for start in range(0, size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        top = tl.maximum(
            top, tl.load(logits + row * size + column, mask=column < size, other=float("-inf")).to(tl.float32)
        )
    most = tl.max(top, axis=0)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + row * size + column, mask=column < size, other=float("-inf")).to(tl.float32)
        total += tl.exp(x - most)
    wanted = tl.load(target + row)
    held = (wanted >= 0) & (wanted < size)
    picked = tl.load(logits + row * size + wanted, mask=held, other=0.0).to(tl.float32)
    tl.store(found + row, most)
    tl.store(found + rows + row, tl.sum(total, axis=0))
    tl.store(found + 2 * rows + row, picked)


@triton.jit
def _slope(logits, target, log_sum, scale, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    held = column < size
    at = logits + row * size + column
    weight = tl.load(scale + row).to(tl.float32)
    share = tl.exp(tl.load(at, mask=held, other=0.0).to(tl.float32) - tl.load(log_sum + row))
    slope = weight * (share - tl.where(column == tl.load(target + row), 1.0, 0.0))
    tl.store(at, slope.to(logits.dtype.element_ty), mask=held)

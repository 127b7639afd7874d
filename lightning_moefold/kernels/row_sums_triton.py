# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for :mod:`.row_sums`: one program sums a block of columns of one token."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


def fixed(x_RD: Tensor, row_TJ: Tensor) -> Tensor:
    """See :func:`.row_sums.sum_of_copies`."""
    (rows, width), (tokens, copies) = x_RD.shape, row_TJ.shape
    total_TD = x_RD.new_empty(tokens, width)
    if tokens and width:
        block = min(_BLOCK, triton.next_power_of_2(width))
        _fixed[tokens, triton.cdiv(width, block)](
            x_RD, row_TJ.contiguous(), total_TD, rows, width, COPIES=copies, BLOCK=block
        )
    return total_TD


def segments(x_RD: Tensor, order_R: Tensor, start_T1: Tensor) -> Tensor:
    """See :func:`.row_sums.sum_of_tokens`: token t has the rows ``order_R[start_T1[t]:start_T1[t + 1]]``."""
    tokens, width = start_T1.shape[0] - 1, x_RD.shape[1]
    total_TD = x_RD.new_empty(tokens, width)
    if tokens and width:
        block = min(_BLOCK, triton.next_power_of_2(width))
        _segments[tokens, triton.cdiv(width, block)](x_RD, order_R, start_T1, total_TD, width, BLOCK=block)
    return total_TD


@triton.jit
def _fixed(x, row_of, total, rows, width, COPIES: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    held = column < width
    result = tl.zeros([BLOCK], dtype=tl.float32)
    for j in tl.static_range(COPIES):
        row = tl.load(row_of + token * COPIES + j)
        filled = tl.where(row < rows, width, 0)
        result += tl.load(x + row * width + column, mask=column < filled, other=0.0).to(tl.float32)
    tl.store(total + token * width + column, result.to(total.dtype.element_ty), mask=held)


@triton.jit
def _segments(x, order, start, total, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    held = column < width
    result = tl.zeros([BLOCK], dtype=tl.float32)
    for number in range(tl.load(start + token), tl.load(start + token + 1)):
        row = tl.load(order + number)
        result += tl.load(x + row * width + column, mask=held, other=0.0).to(tl.float32)
    tl.store(total + token * width + column, result.to(total.dtype.element_ty), mask=held)

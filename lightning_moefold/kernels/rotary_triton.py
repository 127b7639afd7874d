# SPDX-License-Identifier: Apache-2.0
"""Triton kernel for :mod:`.rotary`: one program per position rotates all of its heads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def turn(x_BSHd: Tensor, cos_BSh: Tensor, sin_BSh: Tensor, *, back: bool) -> Tensor:
    """Rotates ``x`` forwards, or back for gradients; its last axis must be contiguous."""
    rows, length, heads, size = x_BSHd.shape
    y_BSHd = torch.empty(x_BSHd.shape, dtype=x_BSHd.dtype, device=x_BSHd.device)
    if y_BSHd.numel():
        cos, sin = cos_BSh.contiguous(), sin_BSh.contiguous()
        _turn[length, rows](
            x_BSHd, cos, sin, y_BSHd, x_BSHd.stride(0), x_BSHd.stride(1), x_BSHd.stride(2),
            0 if cos.shape[0] == 1 else cos.stride(0), length, heads, size // 2, -1.0 if back else 1.0,
            HEADS=triton.next_power_of_2(heads), HALF=triton.next_power_of_2(size // 2),
        )  # fmt: skip
    return y_BSHd


@triton.jit
def _turn(  # type: ignore[no-untyped-def]
    x, cos, sin, y, stride_row, stride_position, stride_head, table_stride, length, heads, half, sign,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    position, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    pair, head = tl.arange(0, HALF)[None, :], tl.arange(0, HEADS)[:, None]
    table = row * table_stride + position * half + pair
    c = tl.load(cos + table, mask=pair < half, other=0.0).to(tl.float32)
    s = tl.load(sin + table, mask=pair < half, other=0.0).to(tl.float32) * sign
    held = (head < heads) & (pair < half)
    at = x + row * stride_row + position * stride_position + head * stride_head + pair
    first = tl.load(at, mask=held, other=0.0).to(tl.float32)
    second = tl.load(at + half, mask=held, other=0.0).to(tl.float32)
    out = y + ((row * length + position) * heads + head) * (2 * half) + pair
    tl.store(out, (first * c - second * s).to(y.dtype.element_ty), mask=held)
    tl.store(out + half, (second * c + first * s).to(y.dtype.element_ty), mask=held)

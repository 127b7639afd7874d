# SPDX-License-Identifier: Apache-2.0
"""Triton kernel for :mod:`.dropout`: one program hashes and scales a block of columns of one token, in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_moefold.kernels.noise import ROUNDS, STEP

_BLOCK = 1024
_STEP = tl.constexpr(STEP)
(_SHIFT_0, _MULTIPLIER_0), (_SHIFT_1, _MULTIPLIER_1) = (map(tl.constexpr, numbers) for numbers in ROUNDS)
# Shifts of int64 repeat the sign, which these clear.
_CLEAR_0, _CLEAR_1 = (tl.constexpr((1 << (64 - bits)) - 1) for bits, _ in ROUNDS)


def dropped(x_NI: Tensor, key_N: Tensor, least: int, scale: float, first: int) -> Tensor:
    """See :func:`.dropout.drop_by`; keeps a number if the upper 24 bits of its hash are at least ``least``."""
    tokens, width = x_NI.shape
    y_NI = torch.empty_like(x_NI, memory_format=torch.contiguous_format)
    if y_NI.numel():
        block = min(_BLOCK, triton.next_power_of_2(width))
        _drop[tokens, triton.cdiv(width, block)](
            x_NI.contiguous(), key_N.contiguous(), y_NI, width, first, least, scale, BLOCK=block
        )
    return y_NI


@triton.jit
def _drop(x, key, y, width, first, least, scale, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    held = column < width
    bits = tl.load(key + token) + (column + (first + 1)).to(tl.int64) * _STEP
    bits = (bits ^ ((bits >> _SHIFT_0) & _CLEAR_0)) * _MULTIPLIER_0
    bits = (bits ^ ((bits >> _SHIFT_1) & _CLEAR_1)) * _MULTIPLIER_1
    kept = ((bits >> 40) & 0xFFFFFF) >= least
    at = token * width + column
    value = tl.load(x + at, mask=held, other=0.0).to(tl.float32)
    # Times zero, as PyTorch's operations do it: what is not finite stays so.
    value = (value * kept.to(tl.float32)) * scale
    tl.store(y + at, value.to(y.dtype.element_ty), mask=held)

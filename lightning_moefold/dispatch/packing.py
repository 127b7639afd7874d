# SPDX-License-Identifier: Apache-2.0
"""Integers and router weights in one message.

Legend: N items, of any shape.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_N: Tensor, index_N: Tensor) -> Tensor:
        integer = _INTEGERS[weight_N.dtype]
        bits_N2 = torch.stack([index_N.to(integer), weight_N.contiguous().view(integer)], dim=-1)
        return bits_N2.view(weight_N.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0][..., 1].contiguous(), None


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed_N2: Tensor) -> tuple[Tensor, Tensor]:
        index_N = packed_N2.view(_INTEGERS[packed_N2.dtype])[..., 0].long()
        ctx.mark_non_differentiable(index_N)
        return packed_N2[..., 1].clone(memory_format=torch.contiguous_format), index_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.stack([torch.zeros_like(grads[0]), grads[0]], dim=-1)


def pack(weight_N: Tensor, index_N: Tensor) -> Tensor:
    """``[N] -> [N, 2]``: numbers that only travel, the bits of the integers and the weights; with the weights' gradient.

    Args:
        weight_N: float32 or float64.
        index_N: int64 of the same shape, each below 2^31.
    """
    return _Pack.apply(weight_N, index_N)


def unpack(packed_N2: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and integers again."""
    return _Unpack.apply(packed_N2)

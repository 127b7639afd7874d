# SPDX-License-Identifier: Apache-2.0
"""Integers and router weights in one message.

Legend: N, M items before and after an exchange, w 32-bit words of a weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Exchange = Callable[[Tensor], Tensor]


class _ExchangeChoices(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_N: Tensor, index_N: Tensor, there: Exchange, back: Exchange) -> tuple[Tensor, Tensor]:
        ctx.back = back
        index = index_N.to(torch.int32).unsqueeze(-1)
        bits = weight_N.contiguous().unsqueeze(-1).view(torch.int32)
        packed_M = there(torch.cat([index, bits], dim=-1))
        index_M = packed_M[..., 0].long()
        ctx.mark_non_differentiable(index_M)
        return packed_M[..., 1:].clone(memory_format=torch.contiguous_format).view(weight_N.dtype).squeeze(-1), index_M

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.back(grads[0].contiguous()), None, None, None


def exchange_choices(weight_N: Tensor, index_N: Tensor, there: Exchange, back: Exchange) -> tuple[Tensor, Tensor]:
    """Sends weights and integers in one collective, ``[N, ...] -> [M, ...]`` both; gradients of the weights come back.

    Args:
        weight_N: float32 or float64.
        index_N: int64 of the same shape, each below 2^31.
        there: The collective, along the first dimension.
        back: Its adjoint, for gradients.
    """
    return _ExchangeChoices.apply(weight_N, index_N, there, back)

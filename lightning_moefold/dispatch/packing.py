# SPDX-License-Identifier: Apache-2.0
"""Integers and router weights in one message.

Legend: N items, of any shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_moefold.comm import linear

_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


def pack(weight_N: Tensor, index_N: Tensor) -> Tensor:
    """``[N] -> [N, 2]``: numbers that only travel, the bits of the integers and the weights; with the weights' gradient.

    Args:
        weight_N: float32 or float64.
        index_N: int64 of the same shape, each below 2^31.
    """
    integer = _INTEGERS[weight_N.dtype]

    def bits(weight_N: Tensor) -> Tensor:
        both_N2 = torch.stack([index_N.to(integer), weight_N.contiguous().view(integer)], dim=-1)
        return both_N2.view(weight_N.dtype)

    return linear(weight_N, bits, _weights)


def unpack(packed_N2: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and integers again."""
    index_N = packed_N2.detach().view(_INTEGERS[packed_N2.dtype])[..., 0].long()
    return linear(packed_N2, _weights, lambda grad: torch.stack([torch.zeros_like(grad), grad], dim=-1)), index_N


def _weights(packed_N2: Tensor) -> Tensor:
    return packed_N2[..., 1].clone(memory_format=torch.contiguous_format)

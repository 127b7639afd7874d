# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding: rotates query and key heads by angles that depend on position (arXiv 2104.09864), in one pass.

Legend: B rows, S positions, H heads, d head size, h = d / 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_moefold.comm import linear
from lightning_moefold.kernels.availability import runs_triton


def rotate(x_BSHd: Tensor, cos_BSh: Tensor, sin_BSh: Tensor) -> Tensor:
    """Rotates each head's pairs ``(x[i], x[i + h])`` by the angle of their position; the shape stays the same.

    Args:
        x_BSHd: Query or key heads.
        cos_BSh: Cosines of the angles, ``[B or 1, S, h]``; they get no gradient.
        sin_BSh: Sines of the angles, of the same shape; they get no gradient.
    """
    if runs_triton(x_BSHd, cos_BSh, sin_BSh) and x_BSHd.stride(-1) == 1:
        from lightning_moefold.kernels.rotary_triton import turn

        def back(grad: Tensor) -> Tensor:
            return turn(grad if grad.stride(-1) == 1 else grad.contiguous(), cos_BSh, sin_BSh, back=True)

        return linear(x_BSHd, lambda x: turn(x, cos_BSh, sin_BSh, back=False), back)
    first, second = x_BSHd.chunk(2, dim=-1)
    cos, sin = cos_BSh.unsqueeze(2), sin_BSh.unsqueeze(2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

# SPDX-License-Identifier: Apache-2.0
"""Turning query and key heads by the angles of their positions (RoFormer, arXiv 2104.09864), in one pass.

Legend: B rows, S positions, H heads, d head size, h = d / 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_moefold.kernels.availability import runs_triton


def rotate(x_BSHd: Tensor, cos_BSh: Tensor, sin_BSh: Tensor) -> Tensor:
    """Turns each head's pairs ``(x[i], x[i + h])`` by their position's angle; same shape out.

    Args:
        x_BSHd: Heads.
        cos_BSh: Cosines, ``[B or 1, S, h]``; they get no gradient.
        sin_BSh: Sines, likewise.
    """
    if runs_triton(x_BSHd, cos_BSh, sin_BSh) and x_BSHd.stride(-1) == 1:
        return _Rotate.apply(x_BSHd, cos_BSh, sin_BSh)
    first, second = x_BSHd.chunk(2, dim=-1)
    cos, sin = cos_BSh.unsqueeze(2), sin_BSh.unsqueeze(2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSHd: Tensor, cos_BSh: Tensor, sin_BSh: Tensor) -> Tensor:
        from lightning_moefold.kernels import rotary_triton

        ctx.save_for_backward(cos_BSh, sin_BSh)
        return rotary_triton.turn(x_BSHd, cos_BSh, sin_BSh, back=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        from lightning_moefold.kernels import rotary_triton

        grad = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        return rotary_triton.turn(grad, *ctx.saved_tensors, back=True), None, None

# SPDX-License-Identifier: Apache-2.0
"""Root-mean-square normalisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_moefold.kernels.compiled import unchanged
from lightning_moefold.modules.base import ParallelModule, local, wide


class _RMSNorm(torch.autograd.Function):
    """Keeps the input and one number per token; backward recomputes the normalised tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Normalises ``[..., size]`` and multiplies by the weight."""
        x_wide = x.to(wide(x.dtype))
        scale = torch.linalg.vecdot(x_wide, x_wide).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
        ctx.save_for_backward(x, weight, scale)
        return unchanged((x_wide * scale).to(x.dtype).mul_(weight))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Computes the gradients of the input and the weight, with sums in at least float32."""
        x, weight, scale = ctx.saved_tensors
        x_hat = x.to(scale.dtype) * scale
        grad_wide = grads[0].to(scale.dtype)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[1]:
            product = grad_wide * x_hat
            grad_weight = product.flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            inner = grad_wide * weight.to(scale.dtype)
            mean = torch.linalg.vecdot(inner, x_hat).div_(x.shape[-1]).unsqueeze(-1)
            grad_x = inner.sub_(x_hat.mul_(mean)).mul_(scale).to(x.dtype)
        return grad_x, grad_weight, None


class RMSNorm(ParallelModule):
    """Computes ``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, with statistics in at least float32.

    Args:
        size: Length of the last dimension.
        eps: Number added to the mean square.
    """

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalises ``[..., size]``; the shape stays the same."""
        weight = local(self.weight)
        if x.is_cuda and x.dtype == weight.dtype:  # PyTorch's own kernel: one pass, statistics in float32
            return F.rms_norm(x, weight.shape, weight, self.eps)
        return _RMSNorm.apply(x, weight, self.eps)

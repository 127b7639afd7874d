# SPDX-License-Identifier: Apache-2.0
"""A stack of experts in parts, whose gradients are written where they belong in the stack's, by kernels that write there.

The loop and cuBLAS do, and none is copied. Grouped products and those in FP8 return gradients in memory of their own; those of
several parts are then copied into one stack.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_moefold.modules.experts.cpu_cache import GRADIENTS


class _Parts(torch.autograd.Function):
    """``split`` along the experts. Its node holds the room for the gradient from the first part's backward to the last's."""

    @staticmethod
    def forward(ctx: Any, stack: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
        ctx.sizes, ctx.shape, ctx.room, ctx.lent = sizes, stack.shape, None, set()
        return stack.split(sizes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        room, ctx.room, ctx.lent = ctx.room, None, set()  # a second backward must not write into what this gives away
        if room is not None and all(
            part.data_ptr() == grad.data_ptr() for part, grad in zip(room.split(ctx.sizes), grads, strict=True)
        ):
            return room, None
        return torch.cat(grads), None


def split_stack(stack: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """As ``stack.split(sizes)``, along the experts."""
    return (stack,) if len(sizes) == 1 else _Parts.apply(stack, sizes)


def gradient_like(weight: Tensor) -> Tensor:
    """Room for the gradient of a stack, or of a part of one: for its first user there, its place in the whole."""
    node: Any = weight.grad_fn
    if not hasattr(node, "room") or weight.output_nr in node.lent:
        return GRADIENTS.empty(weight, *weight.shape)
    if node.room is None:
        node.room = GRADIENTS.empty(weight, *node.shape)
    node.lent.add(weight.output_nr)
    return node.room.split(node.sizes)[weight.output_nr]

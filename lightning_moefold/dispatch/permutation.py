# SPDX-License-Identifier: Apache-2.0
"""Tokens to expert order and back, on one rank.

A token is copied once per chosen expert; the copies ("rows") are sorted by expert. Both directions are autograd
functions, because the generic backward of an index (an atomic or serial ``index_add``) is slow where the inverse
permutation is known: every gradient here is a gather.

Legend: T tokens, K experts per token, R = routed rows <= T*K, D hidden size, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Permutation:
    """The sorted order of the routed rows.

    Args:
        token_R: Token of each row.
        slot_R: Position ``token * K + k`` of each row in the flattened ``[T, K]`` choice.
        row_TK: Row of each choice; R (one past the last row) where the token is routed nowhere.
        counts_E: Rows of each expert, int64.
    """

    token_R: Tensor
    slot_R: Tensor
    row_TK: Tensor
    counts_E: Tensor

    @property
    def rows(self) -> int:
        """Number of routed rows R."""
        return self.token_R.shape[0]


def sort_by_expert(
    expert_TK: Tensor, num_experts: int, routed_T: Tensor | None = None, num_routed: int | None = None
) -> Permutation:
    """Sorts the choices of all tokens by expert, ties in token order.

    Args:
        expert_TK: Chosen experts, int64.
        num_experts: E.
        routed_T: False for tokens that go nowhere (padding).
        num_routed: How many tokens are routed, where the caller knows; otherwise the device is asked.
    """
    tokens, k = expert_TK.shape
    flat = expert_TK.reshape(-1)
    if routed_T is not None:
        flat = flat.masked_fill(~routed_T.repeat_interleave(k), num_experts)
    slot_R = torch.argsort(flat, stable=True)
    # Not bincount, which waits for the device.
    counts_E = torch.zeros(num_experts + 1, dtype=torch.int64, device=flat.device)
    counts_E = counts_E.scatter_add_(0, flat, torch.ones_like(flat))[:num_experts]
    if routed_T is not None:
        slot_R = slot_R[: (int(routed_T.sum()) if num_routed is None else num_routed) * k]
    rows = slot_R.shape[0]
    row_TK = torch.full_like(flat, rows)
    row_TK[slot_R] = torch.arange(rows, device=flat.device)
    return Permutation(slot_R // k, slot_R, row_TK.view(tokens, k), counts_E)


def _take_rows(x_RD: Tensor, row_T: Tensor) -> Tensor:
    """Rows ``row_T`` of ``x_RD``; zeros for row R, one past the last."""
    if x_RD.shape[0] == 0:
        return x_RD.new_zeros((row_T.shape[0], *x_RD.shape[1:]))
    missing_T = row_T == x_RD.shape[0]
    taken = x_RD.index_select(0, row_T.clamp(max=x_RD.shape[0] - 1))
    return taken.masked_fill_(missing_T.unsqueeze(-1), 0)


def _rows_of_choice(x_RD: Tensor, order: Permutation, k: int) -> Tensor:
    row_T = order.row_TK[:, k]
    complete = order.rows == order.row_TK.numel()
    return x_RD.index_select(0, row_T) if complete else _take_rows(x_RD, row_T)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order: Permutation) -> Tensor:
        ctx.order = order
        return x_TD.index_select(0, order.token_R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad_RD, order = grads[0], ctx.order
        grad_TD = _rows_of_choice(grad_RD, order, 0)
        for k in range(1, order.row_TK.shape[1]):
            grad_TD.add_(_rows_of_choice(grad_RD, order, k))
        return grad_TD, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, weight_TK: Tensor, order: Permutation) -> Tensor:
        ctx.order = order
        ctx.save_for_backward(y_RD, weight_TK)
        wide = torch.promote_types(y_RD.dtype, weight_TK.dtype)
        out_TD = _rows_of_choice(y_RD, order, 0).to(wide).mul_(weight_TK[:, 0:1])
        for k in range(1, weight_TK.shape[1]):
            out_TD.addcmul_(_rows_of_choice(y_RD, order, k).to(wide), weight_TK[:, k : k + 1].to(wide))
        return out_TD.to(y_RD.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_TD, order = grads[0], ctx.order
        y_RD, weight_TK = ctx.saved_tensors
        grad_y = grad_weight = None
        grad_RD = grad_TD.index_select(0, order.token_R)
        if ctx.needs_input_grad[1]:
            grad_R = torch.linalg.vecdot(grad_RD.to(weight_TK.dtype), y_RD.to(weight_TK.dtype))
            grad_weight = torch.zeros_like(weight_TK)
            grad_weight.view(-1)[order.slot_R] = grad_R
        if ctx.needs_input_grad[0]:
            weight_R = weight_TK.reshape(-1)[order.slot_R]
            grad_y = (grad_RD * weight_R.unsqueeze(-1)).to(y_RD.dtype)
        return grad_y, grad_weight, None


def permute(x_TD: Tensor, order: Permutation) -> Tensor:
    """Copies tokens into expert order: ``[T, D] -> [R, D]``."""
    return _Permute.apply(x_TD, order)


def combine(y_RD: Tensor, weight_TK: Tensor, order: Permutation) -> Tensor:
    """Weighted sum of each token's rows, ``[R, D] -> [T, D]``, summed in the wider of the two dtypes."""
    return _Combine.apply(y_RD, weight_TK, order)

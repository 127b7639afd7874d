# SPDX-License-Identifier: Apache-2.0
"""Tokens to the order in which they travel and back, on one rank.

A token is copied once per chosen expert; the copies ("rows") are sorted by expert. Both directions are autograd
functions, because the generic backward of an index (an atomic or serial ``index_add``) is slow where the inverse
permutation is known: every gradient here is a gather.

Legend: T tokens, K experts per token, R = rows <= T*K, J copies of a token (K, or fewer), D hidden size, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class SortedChoices:
    """All choices of this rank's tokens, sorted by expert; those that are served come first.

    Args:
        slot_S: Position ``token * K + k`` of each choice in the flattened ``[T, K]``; the unserved ones at the end.
        counts_E: Served choices of each expert, int64, in the order of sorting.
        top_k: K.
        served: Number of served choices R, where the host knows it; else None.
    """

    slot_S: Tensor
    counts_E: Tensor
    top_k: int
    served: int | None


def sort_by_expert(
    expert_TK: Tensor,
    num_experts: int,
    kept_TK: Tensor | None = None,
    served: int | None = None,
    place_E: Tensor | None = None,
) -> SortedChoices:
    """Sorts the choices of all tokens by expert, ties in token order. The host does not wait for the device.

    Args:
        expert_TK: Chosen experts, int64.
        num_experts: E.
        kept_TK: False for choices that nobody serves: of padding, or dropped; None if all are served. ``[T, 1]`` will do
            where a token goes as a whole.
        served: How many are served, where the caller knows.
        place_E: Place of each expert in the order; by number if not given.
    """
    k = expert_TK.shape[1]
    place_TK = expert_TK if place_E is None else place_E[expert_TK]
    if kept_TK is None:
        served = expert_TK.numel()
    else:
        place_TK = place_TK.masked_fill(~kept_TK, num_experts)
    flat = place_TK.reshape(-1)
    # Not bincount, which waits for the device.
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=flat.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat))
    return SortedChoices(flat.argsort(stable=True), counts[:num_experts], k, served)


@dataclass(frozen=True)
class Copies:
    """Which rows are copies of which token.

    Args:
        token_R: Token of each row; T (one past the last) for an empty row.
        row_TJ: Rows of each token; R (one past the last) where it has fewer than J.
        complete: Whether every token has J.
        padded: Whether there are empty rows.
    """

    token_R: Tensor
    row_TJ: Tensor
    complete: bool
    padded: bool = False

    @classmethod
    def of_choices(cls, choices: SortedChoices, rows: int, tokens: int) -> Copies:
        """A row for each served choice, in their order.

        Args:
            choices: The choices.
            rows: R.
            tokens: T.
        """
        slot_R = choices.slot_S[:rows]
        row_S = torch.full_like(choices.slot_S, rows)
        row_S[slot_R] = torch.arange(rows, device=slot_R.device)
        return cls(slot_R // choices.top_k, row_S.view(tokens, choices.top_k), rows == tokens * choices.top_k)


def take_rows(x_RD: Tensor, row_T: Tensor, complete: bool = False) -> Tensor:
    """Rows ``row_T`` of ``x_RD``; zeros for row R, one past the last. No gradient of its own.

    Args:
        x_RD: Rows.
        row_T: Their numbers.
        complete: Whether none is R.
    """
    if complete:
        return x_RD.index_select(0, row_T)
    if x_RD.shape[0] == 0:
        return x_RD.new_zeros((row_T.shape[0], *x_RD.shape[1:]))
    missing_T = row_T == x_RD.shape[0]
    taken = x_RD.index_select(0, row_T.clamp(max=x_RD.shape[0] - 1))
    return taken.masked_fill_(missing_T.view(-1, *[1] * (x_RD.dim() - 1)), 0)


def _sum_of_copies(x_RD: Tensor, copies: Copies) -> Tensor:
    wide = torch.promote_types(x_RD.dtype, torch.float32)
    total = take_rows(x_RD, copies.row_TJ[:, 0], copies.complete).to(wide)
    for j in range(1, copies.row_TJ.shape[1]):
        total.add_(take_rows(x_RD, copies.row_TJ[:, j], copies.complete))
    return total.to(x_RD.dtype)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, copies: Copies) -> Tensor:
        ctx.copies = copies
        return take_rows(x_TD, copies.token_R, not copies.padded)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _sum_of_copies(grads[0], ctx.copies), None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, copies: Copies) -> Tensor:
        ctx.copies = copies
        return _sum_of_copies(y_RD, copies)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return take_rows(grads[0], ctx.copies.token_R, not ctx.copies.padded), None


def spread(x_TD: Tensor, copies: Copies) -> Tensor:
    """A copy of its token for each row, ``[T, D] -> [R, D]``; zeros for empty rows."""
    return _Spread.apply(x_TD, copies)


def collect(y_RD: Tensor, copies: Copies) -> Tensor:
    """Sum of each token's rows, ``[R, D] -> [T, D]``, in at least float32; zero for tokens without rows."""
    return _Collect.apply(y_RD, copies)


class _TakeDistinct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index_R: Tensor) -> Tensor:
        ctx.save_for_backward(index_R)
        ctx.length = x.shape[0]
        return x.index_select(0, index_R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (index_R,) = ctx.saved_tensors
        grad = grads[0].new_zeros((ctx.length, *grads[0].shape[1:]))
        return grad.index_copy_(0, index_R, grads[0]), None


def take_distinct(x: Tensor, index_R: Tensor) -> Tensor:
    """``x[index_R]`` where no index comes twice, so that the gradient is a copy and no sum."""
    return _TakeDistinct.apply(x, index_R)

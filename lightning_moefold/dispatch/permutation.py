# SPDX-License-Identifier: Apache-2.0
"""Tokens to the order in which they travel and back, on one rank.

A token is copied once per chosen expert; the copies ("rows") are sorted by expert. The gradients of both directions are written
out, because the generic backward of an index (an atomic or serial ``index_add``) is slow where the inverse
permutation is known: every gradient here is a gather.

Legend: T tokens, K experts per token, R = rows <= T*K, J copies of a token (K, or fewer), D hidden size, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_moefold.comm import linear
from lightning_moefold.kernels.row_sums import sum_of_copies, take_rows


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
    # Keys of few bits are sorted in fewer passes, and counted by searching: thousands of atomics on a few counters are slow,
    # and bincount waits for the device.
    keys = place_TK.reshape(-1).to(_key_dtype(num_experts))
    keys, slot_S = keys.sort(stable=True)
    ends_E = torch.searchsorted(keys, torch.arange(num_experts, dtype=keys.dtype, device=keys.device), right=True)
    return SortedChoices(slot_S, ends_E.diff(prepend=ends_E.new_zeros(1)), k, served)


def _key_dtype(largest: int) -> torch.dtype:
    """The narrowest dtype that sorts and holds ``largest``."""
    return next(d for d in (torch.uint8, torch.int16, torch.int32) if largest <= torch.iinfo(d).max)


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
        """A row for each served choice, in their order; R ``rows`` of T ``tokens``."""
        slot_R = choices.slot_S[:rows]
        row_S = torch.full_like(choices.slot_S, rows)
        row_S[slot_R] = torch.arange(rows, device=slot_R.device)
        return cls(slot_R // choices.top_k, row_S.view(tokens, choices.top_k), rows == tokens * choices.top_k)


def permute(x_TD: Tensor, copies: Copies) -> Tensor:
    """A copy of its token for each row, ``[T, D] -> [R, D]``; zeros for empty rows."""
    spread, collect = _ways(copies)
    return linear(x_TD, spread, collect)


def unpermute(y_RD: Tensor, copies: Copies) -> Tensor:
    """Sum of each token's rows, ``[R, D] -> [T, D]``, in at least float32; zero for tokens without rows."""
    spread, collect = _ways(copies)
    return linear(y_RD, collect, spread)


def _ways(copies: Copies) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Returns the way of tokens to rows and the way back, of which each is the other's adjoint."""
    spread = partial(take_rows, row_T=copies.token_R, complete=not copies.padded)
    return spread, partial(sum_of_copies, row_TJ=copies.row_TJ, complete=copies.complete)


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

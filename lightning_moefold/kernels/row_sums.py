# SPDX-License-Identifier: Apache-2.0
"""Sums of rows per token, in at least float32 and in a fixed order, so that two runs are bit-identical.

CUDA's ``index_add_`` uses atomics, so its order of summation depends on the threads.

Legend: R rows, T tokens, J largest number of rows of a token, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_moefold.kernels.availability import runs_triton


def sum_of_copies(x_RD: Tensor, row_TJ: Tensor, complete: bool) -> Tensor:
    """Sums the rows ``row_TJ`` of each token, ``[R, D] -> [T, D]``, in the dtype of the rows.

    Args:
        x_RD: Rows.
        row_TJ: Row numbers of each token; R, one past the last row, stands for no row.
        complete: Whether none is R.
    """
    tokens, copies = row_TJ.shape
    if x_RD.dim() == 2 and x_RD.is_contiguous() and runs_triton(x_RD, row_TJ):
        from lightning_moefold.kernels import row_sums_triton

        return row_sums_triton.fixed(x_RD, row_TJ)
    if copies == 1:
        return take_rows(x_RD, row_TJ[:, 0], complete)
    wide = torch.promote_types(x_RD.dtype, torch.float32)
    total = take_rows(x_RD, row_TJ[:, 0], complete).to(wide)
    for j in range(1, copies):
        total.add_(take_rows(x_RD, row_TJ[:, j], complete))
    return total.to(x_RD.dtype)


def take_rows(x_RD: Tensor, row_T: Tensor, complete: bool) -> Tensor:
    """Takes the rows ``row_T`` of ``x_RD``, and zeros for row R, one past the last. Not differentiable.

    Args:
        x_RD: Rows.
        row_T: Numbers of the rows to take.
        complete: Whether none is R.
    """
    if complete:
        return x_RD.index_select(0, row_T)
    if x_RD.shape[0] == 0:
        return x_RD.new_zeros((row_T.shape[0], *x_RD.shape[1:]))
    missing_T = row_T == x_RD.shape[0]
    taken = x_RD.index_select(0, row_T.clamp(max=x_RD.shape[0] - 1))
    return taken.masked_fill_(missing_T.view(-1, *[1] * (x_RD.dim() - 1)), 0)


def sum_of_tokens(x_RD: Tensor, token_R: Tensor, tokens: int) -> Tensor:
    """Sums the rows of each token, ``[R, D] -> [T, D]``. A token may have any number of rows; without rows the sum is zero.

    Args:
        x_RD: Rows.
        token_R: The token of each row.
        tokens: Number of tokens, T.
    """
    if x_RD.is_contiguous() and x_RD.is_cuda | runs_triton(x_RD, token_R):
        sorted_R, order_R = token_R.sort(stable=True)
        if runs_triton(x_RD, token_R):
            from lightning_moefold.kernels import row_sums_triton

            start_T1 = torch.searchsorted(sorted_R, torch.arange(tokens + 1, device=token_R.device))
            return row_sums_triton.segments(x_RD, order_R, start_T1)
    wide = torch.promote_types(x_RD.dtype, torch.float32)
    total = x_RD.new_zeros(tokens, x_RD.shape[1], dtype=wide)
    if x_RD.is_cuda:  # index_put_ sorts, so the sum does not depend on the order of threads
        return total.index_put_((token_R,), x_RD.to(wide), accumulate=True).to(x_RD.dtype)
    return total.index_add_(0, token_R, x_RD.to(wide)).to(x_RD.dtype)

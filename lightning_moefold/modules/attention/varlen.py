# SPDX-License-Identifier: Apache-2.0
"""Attention of packed, padded or windowed rows in one fused CUDA kernel, which builds no mask and skips masked pairs.

Tokens that see each other are adjacent: a document, or a row without its padding. FlashAttention's kernel for sequences
of different lengths (``torch.nn.attention.varlen``) takes these runs without copying.

Legend: B rows, S positions, Q query heads, V key/value heads, d head size, N runs.
"""

from __future__ import annotations

from functools import cache
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor

_DTYPES = (torch.bfloat16, torch.float16)


class Runs(NamedTuple):
    """Runs of adjacent tokens that see each other, within causality and a window.

    Args:
        start_N1: Start of each run in the flattened ``[B * S]``, and the end of the last run, int32.
        longest: Number of tokens in the longest run.
    """

    start_N1: Tensor
    longest: int


def find_runs(
    rows: int, length: int, document_BS: Tensor | None, hidden_BS: Tensor | None, device: torch.device
) -> Runs | None:
    """Finds the runs of a batch; padding before a document is a run by itself.

    Args:
        rows: Number of rows, B.
        length: Number of positions per row, S.
        document_BS: Number of each position's document, ascending along a row, on the host; None if each row is one
            document.
        hidden_BS: True for padding, on the host; None if there is no padding.
        device: Device of the result.

    Returns:
        The runs; None if padding follows a token of its document, because such padding sees the tokens but not itself,
        which runs cannot express.
    """
    begins_BS = torch.zeros(rows, length, dtype=torch.bool)
    begins_BS[:, :1] = True
    if document_BS is not None:
        begins_BS[:, 1:] |= document_BS[:, 1:] != document_BS[:, :-1]
    if hidden_BS is not None:
        if bool((hidden_BS[:, 1:] & ~hidden_BS[:, :-1] & ~begins_BS[:, 1:]).any()):
            return None
        begins_BS[:, 1:] |= hidden_BS[:, 1:] != hidden_BS[:, :-1]
    start_N = begins_BS.flatten().nonzero().flatten()
    start_N1 = torch.cat((start_N, start_N.new_tensor([rows * length]))).to(torch.int32)
    longest = int(start_N1.diff().max()) if start_N1.numel() > 1 else 0
    return Runs(start_N1.to(device), longest)


def takes_runs(q: Tensor) -> bool:
    """Whether the kernel takes these queries (heads second to last): 16-bit, on CUDA, head size at most 256."""
    return q.is_cuda and q.dtype in _DTYPES and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256 and q.shape[0] > 0


def attend_within_runs(q_BSQd: Tensor, k_BSVd: Tensor, v_BSVd: Tensor, runs: Runs, window: int | None) -> Tensor:
    """Computes causal attention within each run, ``[B, S, Q, d]``.

    Args:
        q_BSQd: Queries.
        k_BSVd: Keys; V divides Q, and each key/value head serves consecutive query heads.
        v_BSVd: Values.
        runs: Runs of the flattened batch.
        window: A query sees at most this many keys, itself included; None for all.
    """
    attend, grouped = _kernel()
    q, k, v = (x.flatten(0, 1) for x in (q_BSQd, k_BSVd, v_BSVd))
    left = -1 if window is None else window - 1
    start, longest = runs
    options = grouped if q.shape[1] != k.shape[1] else {}
    return attend(q, k, v, start, start, longest, longest, window_size=(left, 0), **options).view(q_BSQd.shape)


@cache
def _kernel() -> tuple[Any, dict[str, Any]]:
    """Returns PyTorch's function, and its arguments for grouped heads (2.11 needs none)."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}

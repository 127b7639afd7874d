# SPDX-License-Identifier: Apache-2.0
"""Attention of packed, padded or windowed rows in one fused kernel on CUDA: no mask is built, nothing masked is computed.

Tokens that see each other lie next to each other: a document, a row without its padding. FlashAttention's kernel for
sequences of different lengths takes these runs as they lie (``torch.nn.attention.varlen``).

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
    """Tokens that see each other, as causality and a window allow.

    Args:
        start_N1: Where each begins in the flattened ``[B * S]``, and where the last one ends, int32.
        longest: Tokens of the longest.
    """

    start_N1: Tensor
    longest: int


def find_runs(
    rows: int, length: int, document_BS: Tensor | None, hidden_BS: Tensor | None, device: torch.device
) -> Runs | None:
    """The runs of a batch; padding before a document is one by itself.

    Args:
        rows: B.
        length: S.
        document_BS: Number of each position's document, ascending along a row, on the host; None for one in each row.
        hidden_BS: True for padding, on the host; None for none.
        device: Of the result.

    Returns:
        None where padding follows a token of its document: it sees what no run can say, tokens and not padding.
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
    """Whether the kernel takes queries like these (heads last but one): 16 bits, on CUDA, heads of at most 256."""
    return q.is_cuda and q.dtype in _DTYPES and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256 and q.shape[0] > 0


def attend_within_runs(q_BSQd: Tensor, k_BSVd: Tensor, v_BSVd: Tensor, runs: Runs, window: int | None) -> Tensor:
    """Causal attention within each run, ``[B, S, Q, d]``.

    Args:
        q_BSQd: Queries.
        k_BSVd: Keys; V divides Q, and each serves consecutive query heads.
        v_BSVd: Values.
        runs: Of the flattened batch.
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
    """PyTorch's function, and what it wants to be told where heads are grouped (2.11 takes them without a word)."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}

# SPDX-License-Identifier: Apache-2.0
"""Attention of packed, padded or windowed rows in one fused CUDA kernel, which builds no mask and skips masked pairs.

Tokens that see each other are adjacent: a document, or a row without its padding. FlashAttention's kernel for sequences
of different lengths takes these runs without copying. A rank that holds a piece of a run gives it fewer queries than
keys: the kernel lets the last query see up to the last key, and those before it accordingly fewer.

These are the calls that ``torch.nn.attention.varlen`` makes. They are made here, because the keys of other ranks are then not
kept for backward, and because heads may be grouped in every PyTorch that we support.

Legend: B rows, S positions of a row, G ranks, L = S / G positions of a rank, H query heads, V key/value heads, d head size, N
runs, M = B * L queries, K keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_moefold.modules.attention.exchanges import has_kernel_for_runs

_ATEN = torch.ops.aten


class Runs(NamedTuple):
    """Runs of adjacent queries of a rank, each with the keys that it sees, within causality and a window.

    Args:
        q_N1: Start of each run in the rank's flattened queries ``[B * L]``, and the end of the last run, int32.
        k_N1: The same in the keys that are selected; the last query of a run sees its last key.
        longest_q: Number of queries in the longest run.
        longest_k: Number of keys in the run that has most.
        window: A query sees at most this many keys, itself included; None for all.
        key_K: Index of each selected key in those of all ranks, ``[G * B * L]``, one rank after the other. A key may be selected
            twice. None if there is one rank, whose keys are its queries' own.
    """

    q_N1: Tensor
    k_N1: Tensor
    longest_q: int
    longest_k: int
    window: int | None
    key_K: Tensor | None


def find_runs(
    rows: int, held_GL: Tensor, rank: int, document_BS: Tensor | None, hidden_BS: Tensor | None, window: int | None,
    device: torch.device,
) -> Runs | None:  # fmt: skip
    """Finds the runs of a rank; padding before a document is a run by itself, and so is each piece of a run.

    Args:
        rows: Number of rows, B.
        held_GL: Positions that each rank holds of a row, in its order, on the host.
        rank: The rank.
        document_BS: Number of each position's document, ascending along a row, on the host; None if each row is one
            document.
        hidden_BS: True for padding, on the host; None if there is no padding.
        window: A query sees at most this many keys, itself included; None for all.
        device: Device of the result.

    Returns:
        The runs; None if padding follows a token of its document, because such padding sees the tokens but not itself,
        which runs cannot express.
    """
    (size, here), host = held_GL.shape, held_GL.device
    begins_BS = torch.zeros(rows, held_GL.numel(), dtype=torch.bool, device=host)
    begins_BS[:, :1] = True
    if document_BS is not None:
        begins_BS[:, 1:] |= document_BS[:, 1:] != document_BS[:, :-1]
    if hidden_BS is not None:
        if bool((hidden_BS[:, 1:] & ~hidden_BS[:, :-1] & ~begins_BS[:, 1:]).any()):
            return None
        begins_BS[:, 1:] |= hidden_BS[:, 1:] != hidden_BS[:, :-1]
    place_L = held_GL[rank]
    begins_BL = begins_BS[:, place_L]
    begins_BL[:, :1] = True
    begins_BL[:, 1:] |= place_L[1:] != place_L[:-1] + 1
    row_N, at_N = begins_BL.nonzero(as_tuple=True)
    q_N1 = F.pad(row_N * here + at_N, (0, 1), value=rows * here)
    if size == 1:
        return _runs(q_N1, q_N1, window, None, device)
    # Only the first piece of a chunk of positions begins later than its run: it sees keys from before the chunk.
    first_BS = torch.where(begins_BS, torch.arange(begins_BS.shape[1], device=host), 0).cummax(1).values
    place_N = place_L[at_N]
    first_N = first_BS[row_N, place_N]
    if window is not None:
        first_N = torch.maximum(first_N, place_N - window + 1)
    k_N1 = q_N1 + F.pad((place_N - first_N).cumsum(0), (1, 0))
    run_K = torch.arange(len(row_N), device=host).repeat_interleave(k_N1.diff())
    place_K = first_N[run_K] + torch.arange(len(run_K), device=host) - k_N1[run_K]
    held_K = torch.argsort(held_GL.flatten())[place_K]
    key_K = (held_K // here * rows + row_N[run_K]) * here + held_K % here
    return _runs(q_N1, k_N1, window, key_K, device)


def _runs(q_N1: Tensor, k_N1: Tensor, window: int | None, key_K: Tensor | None, device: torch.device) -> Runs:
    longest = [int(x.diff().max()) if x.numel() > 1 else 0 for x in (q_N1, k_N1)]
    q_N1, k_N1 = (x.to(device, torch.int32) for x in (q_N1, k_N1))
    return Runs(q_N1, k_N1, longest[0], longest[1], window, None if key_K is None else key_K.to(device))


def takes_runs(q_BHLd: Tensor) -> bool:
    """Whether the kernel takes these queries: of any row, on CUDA, see :func:`~.exchanges.has_kernel_for_runs`."""
    q = q_BHLd
    return q.is_cuda and q.shape[0] > 0 and has_kernel_for_runs(q.shape[-1], q.element_size())


def runs_forward(q_MHd: Tensor, k_KVd: Tensor, v_KVd: Tensor, runs: Runs) -> tuple[Tensor, Tensor]:
    """Computes causal attention within each run: output ``[M, H, d]`` and log-sum-exp ``[H, M]``.

    Args:
        q_MHd: Queries of the rank.
        k_KVd: Selected keys; V divides H, and each key/value head serves consecutive query heads.
        v_KVd: Selected values.
        runs: The runs.
    """
    out, lse = _ATEN._flash_attention_forward(
        q_MHd, k_KVd, v_KVd, *runs[:4], 0.0, runs.window is None, False, **_window(runs)
    )[:2]
    return out, lse


def runs_backward(
    grad_MHd: Tensor, q_MHd: Tensor, k_KVd: Tensor, v_KVd: Tensor, out_MHd: Tensor, lse_HM: Tensor, runs: Runs
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the gradients of queries and selected keys and values from the results of :func:`runs_forward`."""
    state = torch.zeros(2, dtype=torch.uint64, device=q_MHd.device)  # unused without dropout, as is what follows it
    return _ATEN._flash_attention_backward(
        grad_MHd, q_MHd, k_KVd, v_KVd, out_MHd, lse_HM.contiguous(), *runs[:4], 0.0, runs.window is None, state,
        q_MHd.new_empty(0), **_window(runs),
    )  # fmt: skip


def _window(runs: Runs) -> dict[str, int]:
    """How many keys a query sees before and after its own."""
    return {"window_size_left": -1 if runs.window is None else runs.window - 1, "window_size_right": 0}

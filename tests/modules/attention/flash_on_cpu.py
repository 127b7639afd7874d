# SPDX-License-Identifier: Apache-2.0
"""CUDA's flash kernel for sequences of different lengths as plain loops on CPU, in any dtype: what it is told, and what it returns.

As FlashAttention documents it: sequences are given by where they start, the last query of a sequence is aligned with its last
key, and a window counts the keys before and after a query's own, -1 for all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from lightning_moefold.modules.attention import context, varlen


@dataclass
class Calls:
    """What the kernels were told.

    Args:
        forward: Numbers of queries and keys of each call, forward.
        backward: The same, backward.
    """

    forward: list[tuple[int, int]] = field(default_factory=list)
    backward: list[tuple[int, int]] = field(default_factory=list)


def _pairs(
    q: Tensor,
    k: Tensor,
    start_q: Tensor,
    start_k: Tensor,
    longest_q: int,
    longest_k: int,
    causal: bool,
    left: int,
    right: int,
) -> Iterator[tuple[int, int, int, slice]]:
    """Yields head of queries, head of keys, query and the keys that it sees, and checks what the kernel would check."""
    for start, longest, x in ((start_q, longest_q, q), (start_k, longest_k, k)):
        assert start.dtype == torch.int32
        assert start[0] == 0
        assert start[-1] == len(x)
        assert longest == int(start.diff().max())
        assert bool((start.diff() > 0).all())
    assert x.stride(-1) == 1
    assert causal == (left == -1)
    assert right == 0
    share = q.shape[1] // k.shape[1]
    for n in range(len(start_q) - 1):
        (a, b), (c, d) = ((int(start[n]), int(start[n + 1])) for start in (start_q, start_k))
        for i in range(a, b):
            last = i + (d - b)  # aligned at the ends
            first = c if left < 0 else max(c, last - left)
            for head in range(q.shape[1]):
                yield head, head // share, i, slice(first, min(last + right, d - 1) + 1)


def _forward(
    calls: Calls, q: Tensor, k: Tensor, v: Tensor, start_q: Tensor, start_k: Tensor, longest_q: int, longest_k: int,
    dropout: float, causal: bool, debug: bool, *, window_size_left: int, window_size_right: int,
) -> tuple[Any, ...]:  # fmt: skip
    assert (dropout, debug) == (0.0, False)
    calls.forward.append((len(q), len(k)))
    out, lse = torch.full_like(q, torch.nan), q.new_full((q.shape[1], len(q)), torch.nan)
    for head, group, i, seen in _pairs(
        q, k, start_q, start_k, longest_q, longest_k, causal, window_size_left, window_size_right
    ):
        score = k[seen, group] @ q[i, head] * q.shape[-1] ** -0.5
        lse[head, i] = score.logsumexp(0)
        out[i, head] = score.softmax(0) @ v[seen, group]
    return out, lse, None, None, None


def _backward(
    calls: Calls, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, start_q: Tensor, start_k: Tensor,
    longest_q: int, longest_k: int, dropout: float, causal: bool, state: Tensor, unused: Tensor, *,
    window_size_left: int, window_size_right: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    assert dropout == 0.0
    assert state.dtype == torch.uint64
    assert lse.is_contiguous()
    calls.backward.append((len(q), len(k)))
    grads = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    scale = q.shape[-1] ** -0.5
    for head, group, i, seen in _pairs(
        q, k, start_q, start_k, longest_q, longest_k, causal, window_size_left, window_size_right
    ):
        share = (k[seen, group] @ q[i, head] * scale - lse[head, i]).exp()
        slope = share * (v[seen, group] @ grad[i, head] - grad[i, head] @ out[i, head]) * scale
        grads[0][i, head] += slope @ k[seen, group]
        grads[1][seen, group] += slope[:, None] * q[i, head]
        grads[2][seen, group] += share[:, None] * grad[i, head]
    return grads


@contextlib.contextmanager
def flash_on_cpu() -> Iterator[Calls]:
    """Within it, attention runs as on a CUDA device whose kernel takes every dtype."""
    calls = Calls()
    kernels = SimpleNamespace(
        _flash_attention_forward=lambda *args, **kwargs: _forward(calls, *args, **kwargs),
        _flash_attention_backward=lambda *args, **kwargs: _backward(calls, *args, **kwargs),
    )
    with mock.patch.object(varlen, "_ATEN", kernels), mock.patch.object(context, "takes_runs", lambda q: len(q) > 0):
        yield calls

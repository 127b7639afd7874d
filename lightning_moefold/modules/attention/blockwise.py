# SPDX-License-Identifier: Apache-2.0
"""Exact attention block by block: no whole mask is built, and keys may arrive in parts.

For a block of queries and a block of keys, a fused kernel returns the output and the log-sum-exp of the scores. The
results of several key blocks are merged with weights ``exp(lse_block - lse)``. Backward calls the kernels with the
final output and log-sum-exp, so each block's gradient is its share of the whole gradient (FlashAttention, arXiv
2205.14135; over ranks: Ring Attention, arXiv 2310.01889).

Legend: B rows, H query heads, V key/value heads, L queries, K keys, S positions of a row, d head size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_moefold.modules.attention.varlen import Runs, find_runs
from lightning_moefold.modules.base import wide

_ATEN = torch.ops.aten
_ON_CPU = "cpu"
#: Number of queries and keys per block if masks are built.
BLOCK = 1024
#: Average number of positions per document from which a row is cut at documents instead of into blocks with masks.
SHORTEST = 128
#: Score of a masked pair. It is finite, so that a block in which a query sees nothing has a finite result, which is
#: negligible once merged.
_MASKED = {torch.float16: -3e4}


@dataclass(frozen=True)
class Span:
    """Consecutive positions of a row."""

    start: int
    length: int

    @property
    def end(self) -> int:
        """The position after the last one."""
        return self.start + self.length

    def cut(self, longest: int) -> list[Span]:
        """Cuts into spans of at most ``longest`` positions."""
        return [Span(at, min(longest, self.end - at)) for at in range(self.start, self.end, longest)]


class Seen(Enum):
    """What the queries of a block see of a block of keys, if no mask is needed."""

    NOTHING = 0
    ALL = 1
    #: Both blocks are the same positions, and a query sees keys up to its own position.
    CAUSAL = 2


def sees_nothing(real_BS: Tensor, document_BS: Tensor | None, window: int | None) -> Tensor:
    """Returns the positions that see no token, not even themselves, ``[B, S]`` bool; all of them are padding.

    Args:
        real_BS: False for padding.
        document_BS: Document of each position; a new document begins where it changes. None if each row is one
            document.
        window: Number of positions that a query sees, itself included; None for all.
    """
    place_S = torch.arange(real_BS.shape[1], device=real_BS.device)
    first_BS = torch.zeros_like(real_BS, dtype=torch.int64)  # the first position that is seen
    if document_BS is not None:
        begins = torch.ones_like(real_BS)
        begins[:, 1:] = document_BS[:, 1:] != document_BS[:, :-1]
        first_BS = torch.where(begins, place_S, 0).cummax(1).values
    if window is not None:
        first_BS = torch.maximum(first_BS, place_S - window + 1)
    count_BS = F.pad(real_BS.long().cumsum(1), (1, 0))
    return count_BS[:, 1:] == count_BS.gather(1, first_BS)


class Visibility:
    """Which keys a query sees: none after its own position, and not necessarily all before it.

    Args:
        window: Number of keys that a query sees at most, itself included; None for all.
        document_BS: Number of each position's document, ascending along a row; a query sees only its own document.
        real_BS: False for padding, which no position sees, as in ``transformers``. As an exception, padding without a
            token before it sees itself, since a query must see something.
    """

    def __init__(
        self, window: int | None = None, document_BS: Tensor | None = None, real_BS: Tensor | None = None
    ) -> None:
        self.window, self._document_BS, self._real_BS = window, document_BS, real_BS
        # Copies on the host, made once per batch, decide how blocks are treated, so that no block waits for the device.
        self._documents = None if document_BS is None else document_BS.cpu()
        self._hidden = None if real_BS is None else (~real_BS).cpu()
        self._alone_BS = None if real_BS is None else sees_nothing(real_BS, document_BS, window)
        self._alone = None if self._alone_BS is None else self._alone_BS.cpu()
        self._masks: dict[tuple[Span, Span], Tensor] = {}
        self._runs: dict[tuple[int, ...], Runs | None] = {}

    @property
    def is_causal(self) -> bool:
        """Whether causality is the only restriction."""
        return self.window is None and self._document_BS is None and self._real_BS is None

    def runs(self, rows: int, held_GL: Tensor, rank: int, device: torch.device) -> Runs | None:
        """Returns a rank's runs of adjacent tokens (:func:`.varlen.find_runs`); None if runs cannot express what is seen.

        Args:
            rows: Number of rows, B.
            held_GL: Positions that each rank holds of a row, in its order, on the host.
            rank: The rank.
            device: Device of the result.
        """
        key = (rows, *held_GL.shape, rank)
        if key not in self._runs:
            self._runs[key] = find_runs(rows, held_GL, rank, self._documents, self._hidden, self.window, device)
        return self._runs[key]

    def pieces(self, span: Span) -> list[Span]:
        """Cuts a span into the blocks in which it is computed; blocks of neighbouring spans of a row fit together.

        If causality is the only restriction, the span is one block. A single row is cut where its documents and its
        padding begin: pairs of such blocks need no mask, which no fused CUDA kernel would accept. Otherwise blocks have
        a fixed size.
        """
        if self.is_causal:
            return [span]
        document, hidden = self._documents, self._hidden
        if self.window is None and all(x is None or len(x) == 1 for x in (document, hidden)):
            changes = [(x[0, 1:] != x[0, :-1]).nonzero().flatten() + 1 for x in (document, hidden) if x is not None]
            places = [at for at in torch.cat(changes).unique().tolist() if span.start < at < span.end]
            if len(places) <= span.length // SHORTEST:
                edges = [span.start, *places, span.end]
                return [Span(a, b - a) for a, b in itertools.pairwise(edges)]
        return span.cut(BLOCK)

    def of(self, q: Span, k: Span, device: torch.device) -> Seen | Tensor:
        """Returns what queries ``q`` see of keys ``k``: a :class:`Seen`, or a mask ``[B or 1, 1, L, K]`` (bool) on the device."""
        if k.start >= q.end or (self.window is not None and q.start - (k.end - 1) >= self.window):
            return Seen.NOTHING
        crosses = k.end - 1 > q.start
        if not crosses and self._all_hidden(q, k):
            return Seen.NOTHING
        if q == k and self._alone is not None and self._is_padding(k):
            alone = self._alone[:, k.start : k.end]
            if bool(alone.all()):
                return Seen.CAUSAL  # padding before any token, whose output is not used
            if not bool(alone.any()):
                return Seen.NOTHING
        if not self._needs_mask(q, k):
            if not crosses:
                return Seen.ALL
            if q.start == k.start:
                return Seen.CAUSAL
        if (q, k) not in self._masks:
            self._masks[q, k] = self._mask(q, k, device)
        return self._masks[q, k]

    def _all_hidden(self, q: Span, k: Span) -> bool:
        if self._documents is not None and bool((self._documents[:, k.end - 1] < self._documents[:, q.start]).all()):
            return True
        return self._is_padding(k)

    def _is_padding(self, span: Span) -> bool:
        return self._hidden is not None and bool(self._hidden[:, span.start : span.end].all())

    def _needs_mask(self, q: Span, k: Span) -> bool:
        if self.window is not None and q.end - 1 - k.start >= self.window:
            return True
        if self._documents is not None and bool((self._documents[:, k.start] != self._documents[:, q.end - 1]).any()):
            return True
        return self._hidden is not None and bool(self._hidden[:, k.start : k.end].any())

    def _mask(self, q: Span, k: Span, device: torch.device) -> Tensor:
        distance_LK = (
            torch.arange(q.start, q.end, device=device)[:, None] - torch.arange(k.start, k.end, device=device)[None]
        )
        seen = (distance_LK >= 0).unsqueeze(0)
        if self.window is not None:
            seen = seen & (distance_LK < self.window)
        if self._document_BS is not None:
            seen = seen & (self._document_BS[:, q.start : q.end, None] == self._document_BS[:, None, k.start : k.end])
        if self._real_BS is not None:
            seen = seen & self._real_BS[:, None, k.start : k.end]
        if self._alone_BS is not None:
            seen = seen | (self._alone_BS[:, q.start : q.end, None] & (distance_LK == 0))
        return seen.unsqueeze(1)


def _pairs(
    q_spans: Sequence[Span], k_spans: Sequence[Span], visibility: Visibility, device: torch.device
) -> Iterator[tuple[slice, slice, Seen | Tensor]]:
    """Yields pairs of query and key blocks, as slices of tensors that hold the spans one after the other.

    Neighbouring blocks of keys that are seen completely are joined.
    """
    q_at = 0
    for q in q_spans:
        rows, q_at = slice(q_at, q_at + q.length), q_at + q.length
        k_at, whole = 0, None
        for k in k_spans:
            keys, k_at = slice(k_at, k_at + k.length), k_at + k.length
            seen = visibility.of(q, k, device)
            if seen is Seen.ALL:
                whole = keys if whole is None else slice(whole.start, keys.stop)
                continue
            if whole is not None:
                yield rows, whole, Seen.ALL
                whole = None
            if seen is not Seen.NOTHING:
                yield rows, keys, seen
        if whole is not None:
            yield rows, whole, Seen.ALL


class PartialAttention:
    """Output and log-sum-exp of queries over the keys added so far.

    Args:
        q_BHLd: The queries.
        spans: Positions of the queries.
        visibility: Which keys the queries see.
    """

    def __init__(self, q_BHLd: Tensor, spans: Sequence[Span], visibility: Visibility) -> None:
        self.q, self.spans, self.visibility = q_BHLd, spans, visibility
        dtype = wide(q_BHLd.dtype)
        self.out = torch.zeros(q_BHLd.shape, dtype=dtype, device=q_BHLd.device)
        self.lse = torch.full(q_BHLd.shape[:3], -torch.inf, dtype=dtype, device=q_BHLd.device)

    def add(self, k_BVKd: Tensor, v_BVKd: Tensor, spans: Sequence[Span]) -> None:
        """Adds keys and values at the positions ``spans``."""
        for rows, keys, seen in _pairs(self.spans, spans, self.visibility, self.q.device):
            out, lse = block_forward(self.q[:, :, rows], k_BVKd[:, :, keys], v_BVKd[:, :, keys], seen)
            before, total = self.lse[:, :, rows], torch.logaddexp(self.lse[:, :, rows], lse)
            self.out[:, :, rows].mul_((before - total).exp_().unsqueeze(-1))
            self.out[:, :, rows].addcmul_(out.to(total.dtype), (lse - total).exp_().unsqueeze(-1))
            self.lse[:, :, rows] = total


class PartialGradient:
    """Gradients of queries, and of the keys and values that are added.

    Args:
        grad_BHLd: Gradient of the output.
        q_BHLd: The queries.
        out_BHLd: Final output, in the dtype of the queries.
        lse_BHL: Final log-sum-exp.
        spans: Positions of the queries.
        visibility: Which keys the queries see.
    """

    def __init__(
        self, grad_BHLd: Tensor, q_BHLd: Tensor, out_BHLd: Tensor, lse_BHL: Tensor, spans: Sequence[Span],
        visibility: Visibility,
    ) -> None:  # fmt: skip
        self.grad, self.q, self.out, self.lse = grad_BHLd, q_BHLd, out_BHLd, lse_BHL
        self.spans, self.visibility = spans, visibility
        self.grad_q = torch.zeros(q_BHLd.shape, dtype=wide(q_BHLd.dtype), device=q_BHLd.device)

    def add(self, k_BVKd: Tensor, v_BVKd: Tensor, spans: Sequence[Span]) -> Tensor:
        """Returns the gradients of these keys and values from these queries, ``[2, B, V, K, d]``, in at least float32."""
        grads = torch.zeros((2, *k_BVKd.shape), dtype=self.grad_q.dtype, device=k_BVKd.device)
        for rows, keys, seen in _pairs(self.spans, spans, self.visibility, self.q.device):
            grad_q, grad_k, grad_v = block_backward(
                self.grad[:, :, rows], self.q[:, :, rows], k_BVKd[:, :, keys], v_BVKd[:, :, keys],
                self.out[:, :, rows], self.lse[:, :, rows], seen,
            )  # fmt: skip
            self.grad_q[:, :, rows] += grad_q
            grads[0, :, :, keys] += grad_k
            grads[1, :, :, keys] += grad_v
        return grads


# ---- one block -------------------------------------------------------------------------------------------------------


def block_forward(q: Tensor, k: Tensor, v: Tensor, seen: Seen | Tensor) -> tuple[Tensor, Tensor]:
    """Computes attention of a block: output ``[B, H, L, d]`` and log-sum-exp ``[B, H, L]``; heads may be grouped."""
    causal = seen is Seen.CAUSAL
    if q.device.type == _ON_CPU:
        return _ATEN._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=_bias(seen, q.dtype))
    if _flash_takes(q, seen):
        return _ATEN._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[:2]
    scores, v = _scores(q, k, seen), v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    lse = scores.logsumexp(-1)
    return (scores - lse.unsqueeze(-1)).exp().to(v.dtype) @ v, lse


def block_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seen: Seen | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes gradients of a block's queries, keys and values from the final output and log-sum-exp."""
    causal = seen is Seen.CAUSAL
    if q.device.type == _ON_CPU:
        return _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse.contiguous(), 0.0, causal, attn_mask=_bias(seen, q.dtype)
        )
    if _flash_takes(q, seen):
        none = torch.zeros(2, dtype=torch.uint64, device=q.device)  # random state, unused without dropout
        return _ATEN._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, causal, none, none[0]
        )
    groups = q.shape[1] // k.shape[1]
    k_H, v_H = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    share = (_scores(q, k, seen) - lse.unsqueeze(-1)).exp()
    slope = share * (grad @ v_H.mT - (grad * out).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    grads = (slope.to(q.dtype).mT @ q, share.to(q.dtype).mT @ grad)
    grad_k, grad_v = (g.unflatten(1, (k.shape[1], groups)).sum(2) for g in grads)
    return slope.to(q.dtype) @ k_H, grad_k, grad_v


def _flash_takes(q: Tensor, seen: Seen | Tensor) -> bool:
    """Whether CUDA's flash kernel can be used; it takes no mask, no float32 and no odd head sizes."""
    narrow = q.dtype in (torch.bfloat16, torch.float16)
    return q.is_cuda and isinstance(seen, Seen) and narrow and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def _bias(seen: Seen | Tensor, dtype: torch.dtype) -> Tensor | None:
    if isinstance(seen, Seen):
        return None
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, _MASKED.get(dtype, -1e30))


def _scores(q: Tensor, k: Tensor, seen: Seen | Tensor) -> Tensor:
    k_H = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = (q @ k_H.mT).to(wide(q.dtype)) * q.shape[-1] ** -0.5
    if seen is Seen.CAUSAL:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    return scores if isinstance(seen, Seen) else scores.masked_fill(~seen, -1e30)

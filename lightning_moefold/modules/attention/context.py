# SPDX-License-Identifier: Apache-2.0
"""Attention over rows that are cut over context parallel ranks (cp), and over long rows with masks on one rank.

A row of S positions (padded to a multiple of 2 * cp) is cut into 2 * cp chunks; rank i holds chunks i and 2 * cp - 1 - i
("zig-zag"), so that with a causal mask every rank has the same work. Three exchanges bring queries and keys together::

    ring         keys and values travel around the ranks, each step hidden behind the attention to what is there
    all_gather   keys and values of the whole row on every rank, in one collective
    all_to_all   whole rows with a part of the heads on every rank (Ulysses, arXiv 2309.14509)

Where one kernel computes rows with documents, padding or a window (:mod:`.varlen`), ``"auto"`` gathers keys where it would choose
a ring by size, because a ring would compute them in blocks.

Legend: B rows, H query heads, V key/value heads, S positions, L = S / cp positions of a rank, C positions of a chunk, d head
size, G = cp ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_moefold import comm
from lightning_moefold.errors import InputError
from lightning_moefold.mesh import SINGLE, Axis
from lightning_moefold.modules.attention.blockwise import PartialAttention, PartialGradient, Span, Visibility
from lightning_moefold.modules.attention.exchanges import Exchange, exchange_for
from lightning_moefold.modules.attention.varlen import Runs, runs_backward, runs_forward, takes_runs
from lightning_moefold.modules.base import wide

#: Bytes of keys and values in one message: large enough for a link's bandwidth, and small compared with what attention
#: keeps of a long row.
MESSAGE_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class ContextLayout:
    """How the positions of a row are spread over cp ranks.

    Args:
        length: Number of positions S; divisible by ``2 * cp`` if there is more than one rank.
        cp: Context parallel axis.
    """

    length: int
    cp: Axis = SINGLE

    def spans(self, rank: int) -> list[Span]:
        """Returns the positions of a rank in the order in which it holds them."""
        size = self.cp.size
        if size == 1:
            return [Span(0, self.length)]
        chunk = self.length // (2 * size)
        return [Span(rank * chunk, chunk), Span((2 * size - 1 - rank) * chunk, chunk)]

    def positions(self, device: torch.device | None = None, rank: int | None = None) -> Tensor:
        """Returns the positions of a rank of the axis, by default this rank, ``[L]``."""
        spans = self.spans(self.cp.index if rank is None else rank)
        return torch.cat([torch.arange(s.start, s.end, device=device) for s in spans])

    def find(self, position: int) -> tuple[int, int]:
        """Returns the rank that holds a position of the row, and its place among the positions of that rank."""
        for rank in range(self.cp.size):
            before = 0
            for span in self.spans(rank):
                if span.start <= position < span.end:
                    return rank, before + position - span.start
                before += span.end - span.start
        raise IndexError(f"a row of {self.length} has no position {position}")

    def held(self, device: torch.device | None = None) -> Tensor:
        """Returns the positions of each rank, ``[G, L]``."""
        return torch.stack([self.positions(device, rank) for rank in range(self.cp.size)])

    @cached_property
    def held_on_host(self) -> Tensor:
        """:meth:`held` in host memory, made once for all layers."""
        return self.held(torch.device("cpu"))

    def order(self, device: torch.device | None = None) -> Tensor:
        """Returns the index of each position of the row in the concatenation of all ranks, ``[S]``."""
        return torch.argsort(self.held(device).flatten())


def find_runs_of(q_BHLd: Tensor, layout: ContextLayout, visibility: Visibility) -> Runs | None:
    """Returns the runs that one fused kernel computes (:mod:`.varlen`); None if blocks must, or need no mask."""
    if visibility.is_causal or not takes_runs(q_BHLd):
        return None
    return visibility.runs(q_BHLd.shape[0], layout.held_on_host, layout.cp.index, q_BHLd.device)


def choose_exchange(layout: ContextLayout, q: Tensor, k: Tensor) -> Exchange:
    """Returns the exchange that ``"auto"`` chooses for queries ``[B, H, L, d]`` and keys ``[B, V, L, d]``."""
    size = layout.cp.size
    return exchange_for(size, q.shape[1], k.shape[1], 2 * k.numel() * k.element_size() * size)


def context_attention(
    q_BHLd: Tensor, k_BVLd: Tensor, v_BVLd: Tensor, layout: ContextLayout, visibility: Visibility, exchange: Exchange
) -> Tensor:
    """Computes causal attention over whole rows, of which each rank holds its positions. Collective over cp.

    Args:
        q_BHLd: Queries of this rank's positions.
        k_BVLd: Keys of this rank's positions; V divides H.
        v_BVLd: Values of this rank's positions.
        layout: Layout of the row's positions over cp.
        visibility: Which keys a query sees, by positions in the row.
        exchange: Name of the exchange.

    Returns:
        ``[B, H, L, d]``.

    Raises:
        ValueError: If the exchange is ``"all_to_all"`` and cp does not divide the heads.
    """
    asked, size = exchange, layout.cp.size
    if size > 1 and asked == "auto":
        exchange = choose_exchange(layout, q_BHLd, k_BVLd)
    if size == 1 or exchange != "all_to_all":
        runs = None if size > 1 and asked == "ring" else find_runs_of(q_BHLd, layout, visibility)
        return _Attention.apply(q_BHLd, k_BVLd, v_BVLd, layout, visibility, exchange, runs)
    for name, heads in (("query", q_BHLd.shape[1]), ("key/value", k_BVLd.shape[1])):
        if heads % size:
            raise InputError(
                f"context_parallel_exchange='all_to_all' cuts heads over cp={size}, which does not divide the {heads} "
                f"{name} heads of a tp rank; use 'ring' or 'all_gather'."
            )
    whole = ContextLayout(layout.length)
    order = layout.order(q_BHLd.device)
    q, k, v = (_rows_of_some_heads(x, layout.cp, order) for x in (q_BHLd, k_BVLd, v_BVLd))
    y = _Attention.apply(q, k, v, whole, visibility, "ring", find_runs_of(q, whole, visibility))
    return _positions_of_all_heads(y, layout.cp, order)


def _rows_of_some_heads(x_BHLd: Tensor, cp: Axis, order: Tensor) -> Tensor:
    """Exchanges positions for heads, ``[B, H, L, d] -> [B, H / G, S, d]``, with positions in the order of the row."""
    rows, heads, length, size = x_BHLd.shape
    x_GBhLd = x_BHLd.view(rows, cp.size, heads // cp.size, length, size).transpose(0, 1)
    x_GBhLd = comm.all_to_all(x_GBhLd.contiguous(), [1] * cp.size, [1] * cp.size, cp)
    return x_GBhLd.permute(1, 2, 0, 3, 4).flatten(2, 3).index_select(2, order)


def _positions_of_all_heads(x_BhSd: Tensor, cp: Axis, order: Tensor) -> Tensor:
    """Inverts :func:`_rows_of_some_heads`, ``[B, H / G, S, d] -> [B, H, L, d]``."""
    x_BhGLd = x_BhSd.index_select(2, torch.argsort(order)).unflatten(2, (cp.size, -1))
    x_GBhLd = comm.all_to_all(x_BhGLd.permute(2, 0, 1, 3, 4).contiguous(), [1] * cp.size, [1] * cp.size, cp)
    return x_GBhLd.transpose(0, 1).flatten(1, 2)


class _Attention(torch.autograd.Function):
    """Ring or all-gather by groups of heads, so that a rank holds keys and values of other ranks for one group only.

    If there are runs, keys are gathered and one kernel computes a group; otherwise it is computed in blocks.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: ContextLayout, visibility: Visibility, exchange: Exchange,
        runs: Runs | None,
    ) -> Tensor:  # fmt: skip
        """Computes the output ``[B, H, L, d]``, one group of heads after the other."""
        ctx.layout, ctx.visibility, ctx.exchange, ctx.runs = layout, visibility, exchange, runs
        part, groups = _forward if runs is None else _forward_of_runs, _head_groups(q, k, layout)
        if len(groups) == 1:  # nothing is copied
            out, lse = part(q, k, v, ctx)
            out = out.to(q.dtype)
        else:
            out, lse = torch.empty_like(q), torch.empty(q.shape[:3], dtype=wide(q.dtype), device=q.device)
            for heads, kv_heads in groups:
                out[:, heads], lse[:, heads] = part(q[:, heads], k[:, kv_heads], v[:, kv_heads], ctx)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Computes the gradients of queries, keys and values from what forward has kept; keys travel again."""
        q, k, v, out, lse = ctx.saved_tensors
        part, groups = _backward if ctx.runs is None else _backward_of_runs, _head_groups(q, k, ctx.layout)
        if len(groups) == 1:
            found = part(grads[0], q, out, lse, k, v, ctx)
            grad_q, grad_k, grad_v = (x.to(q.dtype) for x in found)
        else:
            grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
            for heads, kv_heads in groups:
                grad_q[:, heads], grad_k[:, kv_heads], grad_v[:, kv_heads] = part(
                    grads[0][:, heads], q[:, heads], out[:, heads], lse[:, heads], k[:, kv_heads], v[:, kv_heads], ctx
                )
        return grad_q, grad_k, grad_v, None, None, None, None


def _head_groups(q_BHLd: Tensor, k_BVLd: Tensor, layout: ContextLayout) -> list[tuple[slice, slice]]:
    """Returns groups of query and key/value heads: as many as fit into a message of ``MESSAGE_BYTES``, but at least one."""
    kv_heads, ratio = k_BVLd.shape[1], q_BHLd.shape[1] // k_BVLd.shape[1]
    a_head = 2 * k_BVLd[:, :1].numel() * k_BVLd.element_size()
    some = kv_heads if layout.cp.size == 1 else max(1, min(kv_heads, MESSAGE_BYTES // max(a_head, 1)))
    starts = range(0, kv_heads, some)
    return [(slice(at * ratio, (at + some) * ratio), slice(at, at + some)) for at in starts]


def _forward(q: Tensor, k: Tensor, v: Tensor, ctx: Any) -> tuple[Tensor, Tensor]:
    layout, visibility = ctx.layout, ctx.visibility
    partial = PartialAttention(q, _pieces(layout, visibility, layout.cp.index), visibility)
    if ctx.exchange == "all_gather" and layout.cp.size > 1:
        k_S, v_S = _gather_keys(k, v, layout)
        partial.add(k_S, v_S, _pieces_of_row(layout, visibility))
    else:
        size, rank = layout.cp.size, layout.cp.index
        pair = _stacked(k, v, layout)
        for step in range(size):
            coming = _Rotation(pair, layout.cp) if isinstance(pair, Tensor) and step < size - 1 else None
            partial.add(pair[0], pair[1], _pieces(layout, visibility, (rank - step) % size))
            pair = pair if coming is None else coming.wait()
    return partial.out, partial.lse


def _backward(
    grad: Tensor, q: Tensor, out: Tensor, lse: Tensor, k: Tensor, v: Tensor, ctx: Any
) -> tuple[Tensor, Tensor, Tensor]:
    layout, visibility = ctx.layout, ctx.visibility
    spans = _pieces(layout, visibility, layout.cp.index)
    partial = PartialGradient(grad.contiguous(), q, out, lse, spans, visibility)
    if ctx.exchange == "all_gather" and layout.cp.size > 1:
        k_S, v_S = _gather_keys(k, v, layout)
        grads = partial.add(k_S, v_S, _pieces_of_row(layout, visibility))
        grad_pair = _scatter_key_gradients(grads, layout)
    else:
        grad_pair = _ring_backward(partial, _stacked(k, v, layout), layout, visibility)
    return partial.grad_q, grad_pair[0], grad_pair[1]


def _forward_of_runs(q: Tensor, k: Tensor, v: Tensor, ctx: Any) -> tuple[Tensor, Tensor]:
    out_MHd, lse_HM = runs_forward(_flat(q), *_selected_keys(k, v, ctx), ctx.runs)
    return _in_rows(out_MHd, len(q)), lse_HM.unflatten(1, (len(q), -1)).transpose(0, 1)


def _backward_of_runs(
    grad: Tensor, q: Tensor, out: Tensor, lse: Tensor, k: Tensor, v: Tensor, ctx: Any
) -> tuple[Tensor, Tensor, Tensor]:
    selected = _selected_keys(k, v, ctx)
    lse_HM = lse.transpose(0, 1).flatten(1)
    grad_q, grad_k, grad_v = runs_backward(_flat(grad), _flat(q), *selected, _flat(out), lse_HM, ctx.runs)
    if ctx.runs.key_K is not None:
        pair = torch.cat((grad_k, grad_v), dim=1).to(wide(q.dtype))
        whole = pair.new_zeros((ctx.layout.cp.size * grad_q.shape[0], *pair.shape[1:]))
        # No key is selected more than twice, so the order of additions does not matter.
        whole.index_add_(0, ctx.runs.key_K, pair)
        grad_k, grad_v = comm.reduce_scatter_raw(whole, ctx.layout.cp).chunk(2, dim=1)
    return _in_rows(grad_q, len(q)), _in_rows(grad_k, len(q)), _in_rows(grad_v, len(q))


def _selected_keys(k: Tensor, v: Tensor, ctx: Any) -> tuple[Tensor, Tensor]:
    """Returns keys and values in the order in which the runs see them, ``[K, V, d]``."""
    if ctx.runs.key_K is None:
        return _flat(k), _flat(v)
    pair = comm.all_gather_raw(torch.cat((_flat(k), _flat(v)), dim=1), ctx.layout.cp)
    k_KVd, v_KVd = pair.index_select(0, ctx.runs.key_K).chunk(2, dim=1)
    return k_KVd, v_KVd


def _flat(x_BHLd: Tensor) -> Tensor:
    """Returns ``[B * L, H, d]``."""
    return x_BHLd.transpose(1, 2).flatten(0, 1)


def _in_rows(x_MHd: Tensor, rows: int) -> Tensor:
    """Inverts :func:`_flat`."""
    return x_MHd.unflatten(0, (rows, -1)).transpose(1, 2)


def _stacked(k: Tensor, v: Tensor, layout: ContextLayout) -> Tensor | tuple[Tensor, Tensor]:
    """Stacks keys and values into one message, unless there is only one rank."""
    return (k, v) if layout.cp.size == 1 else torch.stack([k, v])


def _ring_backward(
    partial: PartialGradient, pair: Tensor | tuple[Tensor, Tensor], layout: ContextLayout, visibility: Visibility
) -> Tensor:
    """Sends keys around as in forward; their gradients follow one step behind and return home after the last step."""
    size, rank = layout.cp.size, layout.cp.index
    if not isinstance(pair, Tensor):
        return partial.add(*pair, _pieces(layout, visibility, rank))
    home: _Rotation | None = None
    for step in range(size):
        coming = _Rotation(pair, layout.cp) if step < size - 1 else None
        total = partial.add(pair[0], pair[1], _pieces(layout, visibility, (rank - step) % size))
        if home is not None:
            total += home.wait()
        home = _Rotation(total, layout.cp)
        pair = pair if coming is None else coming.wait()
    assert home is not None
    return home.wait()


def _pieces(layout: ContextLayout, visibility: Visibility, rank: int) -> list[Span]:
    """Returns the positions of a rank, in the order in which it holds them, as the blocks in which they are computed."""
    return [piece for span in layout.spans(rank) for piece in visibility.pieces(span)]


def _pieces_of_row(layout: ContextLayout, visibility: Visibility) -> list[Span]:
    """Returns all positions of a row, in order, as the blocks of :func:`_pieces`."""
    chunks = Span(0, layout.length).cut(layout.length // (2 * layout.cp.size))
    return [piece for chunk in chunks for piece in visibility.pieces(chunk)]


def _gather_keys(k_BVLd: Tensor, v_BVLd: Tensor, layout: ContextLayout) -> tuple[Tensor, Tensor]:
    """Gathers keys and values of the whole row, in its order."""
    pair = torch.stack([k_BVLd, v_BVLd])
    pairs_G2BVLd = comm.all_gather_raw(pair.unsqueeze(0), layout.cp)
    whole = pairs_G2BVLd.permute(1, 2, 3, 0, 4, 5).flatten(3, 4).index_select(3, layout.order(pair.device))
    return whole[0], whole[1]


def _scatter_key_gradients(grads_2BVSd: Tensor, layout: ContextLayout) -> Tensor:
    held = grads_2BVSd.index_select(3, torch.argsort(layout.order(grads_2BVSd.device)))
    parts = held.unflatten(3, (layout.cp.size, -1)).permute(3, 0, 1, 2, 4, 5)
    return comm.reduce_scatter_raw(parts.contiguous(), layout.cp)[0]


class _Rotation:
    """Sends a tensor to the next rank of an axis and receives the previous rank's, while the caller computes."""

    def __init__(self, x: Tensor, axis: Axis) -> None:
        self.axis = axis
        self._received = torch.empty_like(x)
        after, before = (axis.ranks[(axis.index + step) % axis.size] for step in (1, -1))
        self._work = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, x, after, axis.group),
                dist.P2POp(dist.irecv, self._received, before, axis.group),
            ]
        )

    def wait(self) -> Tensor:
        """Waits, and returns the received tensor."""
        for work in self._work:
            work.wait()
        return self._received

# SPDX-License-Identifier: Apache-2.0
"""Attention by groups of heads, so that a rank holds other ranks' keys and values of few heads only.

Keys and values of other ranks arrive by a ring or an all-gather. They are computed in blocks (:mod:`.blockwise`) or, where keys
are hidden from queries and the kernel takes them, in one kernel call (:mod:`.varlen`), for which keys are always gathered. While
a group is computed, the gathered keys of the next one travel, and the gradients of the previous one's.

Legend: B rows, H query heads, V key/value heads, S positions, L = S / cp positions of a rank, M = B * L, K keys that a rank's
runs select, d head size, G = cp ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_moefold.async_comm import Handle, Spread, SumUp
from lightning_moefold.mesh import Axis
from lightning_moefold.modules.attention.blockwise import PartialAttention, PartialGradient, Span, Visibility
from lightning_moefold.modules.attention.exchanges import Exchange, heads_of_message
from lightning_moefold.modules.attention.layout import ContextLayout
from lightning_moefold.modules.attention.varlen import Runs, runs_backward, runs_forward
from lightning_moefold.modules.base import wide


class AttentionByHeads(torch.autograd.Function):
    """Causal attention of this rank's queries ``[B, H, L, d]`` to the keys and values ``[B, V, L, d]`` of all ranks. Collective."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: ContextLayout, visibility: Visibility, exchange: Exchange,
        runs: Runs | None,
    ) -> Tensor:  # fmt: skip
        """Computes the output ``[B, H, L, d]``, one group of heads after the other."""
        ctx.layout, ctx.visibility, ctx.runs = layout, visibility, runs
        ctx.gathers = layout.cp.size > 1 and (exchange == "all_gather" or runs is not None)
        part, groups = _forward if runs is None else _forward_of_runs, _head_groups(q, k, layout)
        keys = _keys_of(k, v, groups, ctx)
        if len(groups) == 1:  # nothing is copied
            out, lse = part(q, *next(keys), ctx)
            out = out.to(q.dtype)
        else:
            out, lse = torch.empty_like(q), torch.empty(q.shape[:3], dtype=wide(q.dtype), device=q.device)
            for heads, _ in groups:
                out[:, heads], lse[:, heads] = part(q[:, heads], *next(keys), ctx)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Computes the gradients of queries, keys and values from what forward has kept; keys travel again."""
        q, k, v, out, lse = ctx.saved_tensors
        part, groups = _backward if ctx.runs is None else _backward_of_runs, _head_groups(q, k, ctx.layout)
        keys = _keys_of(k, v, groups, ctx)
        if len(groups) == 1:
            grad_q, key_grads = part(grads[0], q, out, lse, *next(keys), ctx)
            found = (grad_q, *_sum_over_ranks(key_grads, q, ctx)())
            grad_q, grad_k, grad_v = (x.to(q.dtype) for x in found)
        else:
            grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
            travelling: list[tuple[slice, Callable[[], tuple[Tensor, Tensor]]]] = []
            for heads, kv_heads in groups:
                grad_q[:, heads], key_grads = part(
                    grads[0][:, heads], q[:, heads], out[:, heads], lse[:, heads], *next(keys), ctx
                )
                travelling.append((kv_heads, _sum_over_ranks(key_grads, q, ctx)))
                del key_grads  # a message holds them, or nothing does
                if len(travelling) > 1:
                    _arrive(*travelling.pop(0), grad_k, grad_v)
            _arrive(*travelling.pop(), grad_k, grad_v)
        return grad_q, grad_k, grad_v, None, None, None, None


def _head_groups(q_BHLd: Tensor, k_BVLd: Tensor, layout: ContextLayout) -> list[tuple[slice, slice]]:
    """Returns groups of query and key/value heads, as many as one message holds; one group if there is one rank."""
    kv_heads, ratio = k_BVLd.shape[1], q_BHLd.shape[1] // k_BVLd.shape[1]
    some = kv_heads
    if layout.cp.size > 1:
        some = heads_of_message(kv_heads, 2 * k_BVLd[:, :1].numel() * k_BVLd.element_size())
    starts = range(0, kv_heads, some)
    return [(slice(at * ratio, (at + some) * ratio), slice(at, at + some)) for at in starts]


def _keys_of(
    k_BVLd: Tensor, v_BVLd: Tensor, groups: list[tuple[slice, slice]], ctx: Any
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields keys and values of each group of heads: of all ranks if they are gathered, else of this rank."""
    if not ctx.gathers:
        yield from ((k_BVLd[:, some], v_BVLd[:, some]) for _, some in groups)
        return
    pack, unpack = (_pack_row, _unpack_row) if ctx.runs is None else (_pack_runs, _unpack_runs)

    def start(some: slice) -> Handle:
        message = pack(k_BVLd[:, some], v_BVLd[:, some])
        handle = Handle([Spread([len(message)] * ctx.layout.cp.size)], ctx.layout.cp, yields=False)
        handle.start([message])
        return handle

    coming = [start(groups[0][1])]
    for _, some in groups[1:]:
        coming.append(start(some))
        yield unpack(coming.pop(0).wait()[0], ctx)
    yield unpack(coming.pop().wait()[0], ctx)


def _sum_over_ranks(key_grads: Any, q: Tensor, ctx: Any) -> Callable[[], tuple[Tensor, Tensor]]:
    """Starts to sum gradients of gathered keys and values; returns the function that waits for those of this rank's keys."""
    if not ctx.gathers:
        return lambda: key_grads
    size = ctx.layout.cp.size
    message = _pack_row_gradients(key_grads, ctx) if ctx.runs is None else _pack_run_gradients(key_grads, q, ctx)
    handle = Handle([SumUp([len(message) // size] * size)], ctx.layout.cp, yields=False)
    handle.start([message])

    def wait() -> tuple[Tensor, Tensor]:
        (mine,) = handle.wait()
        if ctx.runs is None:
            return mine[0, 0], mine[0, 1]
        grad_k, grad_v = (_in_rows(x, len(q)) for x in mine.chunk(2, dim=1))
        return grad_k, grad_v

    return wait


def _arrive(kv_heads: slice, wait: Callable[[], tuple[Tensor, Tensor]], grad_k: Tensor, grad_v: Tensor) -> None:
    grad_k[:, kv_heads], grad_v[:, kv_heads] = wait()


# ---- in blocks -------------------------------------------------------------------------------------------------------


def _forward(q: Tensor, k: Tensor, v: Tensor, ctx: Any) -> tuple[Tensor, Tensor]:
    layout, visibility = ctx.layout, ctx.visibility
    partial = PartialAttention(q, _pieces(layout, visibility, layout.cp.index), visibility)
    if ctx.gathers:
        partial.add(k, v, _pieces_of_row(layout, visibility))
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
) -> tuple[Tensor, Tensor]:
    """Returns the gradient of queries, and of the keys and values that were given, ``[2, ...]``."""
    layout, visibility = ctx.layout, ctx.visibility
    spans = _pieces(layout, visibility, layout.cp.index)
    partial = PartialGradient(grad.contiguous(), q, out, lse, spans, visibility)
    if ctx.gathers:
        grad_pair = partial.add(k, v, _pieces_of_row(layout, visibility))
    else:
        grad_pair = _ring_backward(partial, _stacked(k, v, layout), layout, visibility)
    return partial.grad_q, grad_pair


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


def _pack_row(k_BVLd: Tensor, v_BVLd: Tensor) -> Tensor:
    """Returns the message ``[1, 2, B, V, L, d]``."""
    return torch.stack([k_BVLd, v_BVLd]).unsqueeze(0)


def _unpack_row(pairs_G2BVLd: Tensor, ctx: Any) -> tuple[Tensor, Tensor]:
    """Returns keys and values of the whole row, in its order."""
    order_S = ctx.layout.order(pairs_G2BVLd.device)
    whole_2BVSd = pairs_G2BVLd.permute(1, 2, 3, 0, 4, 5).flatten(3, 4).index_select(3, order_S)
    return whole_2BVSd[0], whole_2BVSd[1]


def _pack_row_gradients(grads_2BVSd: Tensor, ctx: Any) -> Tensor:
    """Returns the message ``[G, 2, B, V, L, d]``."""
    held = grads_2BVSd.index_select(3, torch.argsort(ctx.layout.order(grads_2BVSd.device)))
    return held.unflatten(3, (ctx.layout.cp.size, -1)).permute(3, 0, 1, 2, 4, 5).contiguous()


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


# ---- in one kernel ---------------------------------------------------------------------------------------------------


def _forward_of_runs(q: Tensor, k: Tensor, v: Tensor, ctx: Any) -> tuple[Tensor, Tensor]:
    out_MHd, lse_HM = runs_forward(_flat(q), *_flat_keys(k, v, ctx), ctx.runs)
    return _in_rows(out_MHd, len(q)), lse_HM.unflatten(1, (len(q), -1)).transpose(0, 1)


def _backward_of_runs(
    grad: Tensor, q: Tensor, out: Tensor, lse: Tensor, k: Tensor, v: Tensor, ctx: Any
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Returns the gradient of queries, and of the keys and values that were given."""
    lse_HM = lse.transpose(0, 1).flatten(1)
    keys = _flat_keys(k, v, ctx)
    grad_q, grad_k, grad_v = runs_backward(_flat(grad), _flat(q), *keys, _flat(out), lse_HM, ctx.runs)
    if not ctx.gathers:
        grad_k, grad_v = _in_rows(grad_k, len(q)), _in_rows(grad_v, len(q))
    return _in_rows(grad_q, len(q)), (grad_k, grad_v)


def _flat_keys(k: Tensor, v: Tensor, ctx: Any) -> tuple[Tensor, Tensor]:
    """Returns keys and values ``[K, V, d]``, which they are already if they were gathered."""
    return (k, v) if ctx.gathers else (_flat(k), _flat(v))


def _pack_runs(k_BVLd: Tensor, v_BVLd: Tensor) -> Tensor:
    """Returns the message ``[M, 2 V, d]``."""
    return torch.cat((_flat(k_BVLd), _flat(v_BVLd)), dim=1)


def _unpack_runs(pair: Tensor, ctx: Any) -> tuple[Tensor, Tensor]:
    """Returns keys and values in the order in which the runs see them, ``[K, V, d]``."""
    k_KVd, v_KVd = pair.index_select(0, ctx.runs.key_K).chunk(2, dim=1)
    return k_KVd, v_KVd


def _pack_run_gradients(grads: tuple[Tensor, Tensor], q_BHLd: Tensor, ctx: Any) -> Tensor:
    """Returns the message ``[G * M, 2 V, d]``."""
    rows, _, length, _ = q_BHLd.shape
    pair = torch.cat(grads, dim=1).to(wide(q_BHLd.dtype))
    whole = pair.new_zeros((ctx.layout.cp.size * rows * length, *pair.shape[1:]))
    # No key is selected more than twice, so the order of additions does not matter.
    return whole.index_add_(0, ctx.runs.key_K, pair)


def _flat(x_BHLd: Tensor) -> Tensor:
    """Returns ``[B * L, H, d]``."""
    return x_BHLd.transpose(1, 2).flatten(0, 1)


def _in_rows(x_MHd: Tensor, rows: int) -> Tensor:
    """Inverts :func:`_flat`."""
    return x_MHd.unflatten(0, (rows, -1)).transpose(1, 2)

# SPDX-License-Identifier: Apache-2.0
"""The few differentiable collectives of the system, each on local tensors over one :class:`~.mesh.Axis`.

Every function is the identity (no group, no copy) on an axis of one rank. Each backward is written out: the autograd
registered for torch's functional collectives sums where Megatron's "f" and "g" must not (an all-reduce of an already
equal loss would multiply its gradient by the group size). Uneven exchanges go through ``all_to_all_single``, the one
collective that takes uneven sizes, zero included, on gloo and NCCL alike. Those that hide behind computation are in
:mod:`.async_comm`.

Legend: N, M tokens before and after an exchange; G ranks of the axis; D any trailing dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_moefold.errors import PeerError
from lightning_moefold.mesh import Axis

Counts = Sequence[int]

# torch 2.13 gave these two new names and warns of the old ones, which are all that 2.11 has.
ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
REDUCE_SCATTER = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"

P = ParamSpec("P")
T = TypeVar("T")

# ---- compiled callers ------------------------------------------------------------------------------------------------


@torch.compiler.disable(reason="lightning_moefold runs this as it is")
def uncompiled(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Calls ``function(*args, **kwargs)``. In a compiled caller this breaks the graph, so the function is not traced."""
    return function(*args, **kwargs)


def _breaks_graphs(collective: Callable[..., T]) -> Callable[..., T]:
    """Makes a collective, whose last argument is the axis, break the graph of compiled callers.

    Within a graph, the compiler could reorder it or remove it if its result is unused, on one rank and not on another.
    """

    @wraps(collective)
    def call(*args: Any) -> T:
        return collective(*args) if args[-1].size == 1 else uncompiled(collective, *args)

    return call


# ---- plain collectives (no gradient) ---------------------------------------------------------------------------------


@_breaks_graphs
def all_gather_raw(x_ND: Tensor, axis: Axis) -> Tensor:
    """Concatenates tensors of equal length from all ranks: ``[N, D] -> [G*N, D]``."""
    if axis.size == 1:
        return x_ND
    out = x_ND.new_empty((axis.size * x_ND.shape[0], *x_ND.shape[1:]))
    getattr(dist, ALL_GATHER)(out, x_ND.contiguous(), group=axis.group)
    return out


@_breaks_graphs
def reduce_scatter_raw(x_ND: Tensor, axis: Axis) -> Tensor:
    """Sums over ranks and keeps this rank's part: ``[G*N, D] -> [N, D]``."""
    if axis.size == 1:
        return x_ND
    out = x_ND.new_empty((x_ND.shape[0] // axis.size, *x_ND.shape[1:]))
    getattr(dist, REDUCE_SCATTER)(out, x_ND.contiguous(), group=axis.group)
    return out


@_breaks_graphs
def all_reduce_raw(x: Tensor, axis: Axis) -> Tensor:
    """Sums ``x`` over the ranks of ``axis``, in place."""
    if axis.size > 1:
        dist.all_reduce(x, group=axis.group)
    return x


def broadcast_flat(tensors: Sequence[Tensor], axis: Axis) -> None:
    """Gives all ranks the first one's values, in place, with one broadcast per dtype."""
    if axis.size == 1:
        return
    for dtype in sorted({t.dtype for t in tensors}, key=str):  # in the same order on all ranks
        members = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.reshape(-1) for t in members])
        dist.broadcast(flat.view(torch.uint8) if dtype == torch.bool else flat, src=axis.ranks[0], group=axis.group)
        for tensor, part in zip(members, flat.split([t.numel() for t in members]), strict=True):
            tensor.copy_(part.view_as(tensor))


@_breaks_graphs
def all_to_all_raw(x_ND: Tensor, send: Counts, receive: Counts, axis: Axis) -> Tensor:
    """Sends ``send[i]`` rows to rank i and receives ``receive[i]`` rows from it: ``[sum(send), D] -> [sum(receive), D]``."""
    if axis.size == 1:
        return x_ND
    out = x_ND.new_empty((sum(receive), *x_ND.shape[1:]))
    dist.all_to_all_single(out, x_ND.contiguous(), list(receive), list(send), group=axis.group)
    return out


@_breaks_graphs
def all_gather_uneven_raw(x_ND: Tensor, counts: Counts, axis: Axis) -> Tensor:
    """Concatenates tensors of ``counts[i]`` rows on rank i: ``[counts[me], D] -> [sum(counts), D]``."""
    if len(set(counts)) == 1:
        return all_gather_raw(x_ND, axis)
    repeated = x_ND.repeat(axis.size, *[1] * (x_ND.dim() - 1))
    return all_to_all_raw(repeated, [x_ND.shape[0]] * axis.size, counts, axis)


@_breaks_graphs
def reduce_scatter_uneven_raw(x_ND: Tensor, counts: Counts, axis: Axis) -> Tensor:
    """Sums over ranks and keeps this rank's part: ``[sum(counts), D] -> [counts[me], D]``."""
    if len(set(counts)) == 1:
        return reduce_scatter_raw(x_ND, axis)
    mine = counts[axis.index]
    parts = all_to_all_raw(x_ND, counts, [mine] * axis.size, axis)
    return parts.view(axis.size, mine, *x_ND.shape[1:]).sum(0)


# ---- differentiable collectives --------------------------------------------------------------------------------------


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_gather_raw(x_ND, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter_raw(grads[0], ctx.axis), None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return reduce_scatter_raw(x_ND, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_gather_raw(grads[0], ctx.axis), None


class _GatherIdentical(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, axis: Axis) -> Tensor:
        ctx.axis, ctx.rows = axis, x_ND.shape[0]
        return all_gather_raw(x_ND, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].narrow(0, ctx.axis.index * ctx.rows, ctx.rows).contiguous(), None


class _SplitIdentical(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        rows = x_ND.shape[0] // axis.size
        return x_ND.narrow(0, axis.index * rows, rows).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_gather_raw(grads[0], ctx.axis), None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, send: Counts, receive: Counts, axis: Axis) -> Tensor:
        ctx.send, ctx.receive, ctx.axis = send, receive, axis
        return all_to_all_raw(x_ND, send, receive, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return all_to_all_raw(grads[0], ctx.receive, ctx.send, ctx.axis), None, None, None


class _GatherUneven(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, counts: Counts, axis: Axis) -> Tensor:
        ctx.counts, ctx.axis = counts, axis
        return all_gather_uneven_raw(x_ND, counts, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return reduce_scatter_uneven_raw(grads[0], ctx.counts, ctx.axis), None, None


class _ReduceScatterUneven(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, counts: Counts, axis: Axis) -> Tensor:
        ctx.counts, ctx.axis = counts, axis
        return reduce_scatter_uneven_raw(x_ND, counts, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return all_gather_uneven_raw(grads[0], ctx.counts, ctx.axis), None, None


@_breaks_graphs
def all_gather(x_ND: Tensor, axis: Axis) -> Tensor:
    """All-gathers ``[N, D] -> [G*N, D]``; backward sums the ranks' gradients and keeps this rank's part (reduce-scatter)."""
    return x_ND if axis.size == 1 else _AllGather.apply(x_ND, axis)


@_breaks_graphs
def reduce_scatter(x_ND: Tensor, axis: Axis) -> Tensor:
    """Reduce-scatters ``[G*N, D] -> [N, D]``: sums over ranks and keeps this rank's part; backward is an all-gather."""
    return x_ND if axis.size == 1 else _ReduceScatter.apply(x_ND, axis)


@_breaks_graphs
def gather_identical(x_ND: Tensor, axis: Axis) -> Tensor:
    """All-gathers ``[N, D] -> [G*N, D]`` for ranks that then compute the same: backward keeps this rank's part, unsummed."""
    return x_ND if axis.size == 1 else _GatherIdentical.apply(x_ND, axis)


@_breaks_graphs
def split_identical(x_ND: Tensor, axis: Axis) -> Tensor:
    """Keeps this rank's part of a tensor that every rank has, ``[G*N, D] -> [N, D]``; backward is an all-gather."""
    return x_ND if axis.size == 1 else _SplitIdentical.apply(x_ND, axis)


@_breaks_graphs
def all_to_all(x_ND: Tensor, send: Counts, receive: Counts, axis: Axis) -> Tensor:
    """All-to-all-v, ``[sum(send), D] -> [sum(receive), D]``; backward sends the gradients back."""
    return x_ND if axis.size == 1 else _AllToAll.apply(x_ND, send, receive, axis)


@_breaks_graphs
def all_gather_uneven(x_ND: Tensor, counts: Counts, axis: Axis) -> Tensor:
    """All-gather-v, ``[counts[me], D] -> [sum(counts), D]``; backward is :func:`reduce_scatter_uneven`."""
    return x_ND if axis.size == 1 else _GatherUneven.apply(x_ND, counts, axis)


@_breaks_graphs
def reduce_scatter_uneven(x_ND: Tensor, counts: Counts, axis: Axis) -> Tensor:
    """Reduce-scatter-v, ``[sum(counts), D] -> [counts[me], D]``; backward is :func:`all_gather_uneven`."""
    return x_ND if axis.size == 1 else _ReduceScatterUneven.apply(x_ND, counts, axis)


# ---- agreement on errors ---------------------------------------------------------------------------------------------


def agree_on_error(error: Exception | None, axis: Axis) -> None:
    """Raises on every rank of ``axis`` if any of them has an error, so that no peer waits for one that is gone.

    Args:
        error: This rank's error, or None. Every rank of the axis must call this function, since it is collective.
        axis: The ranks that agree, usually the world.

    Raises:
        Exception: This rank's own error; on ranks without one, a PeerError that quotes the first failing rank's.
    """
    if axis.size > 1:
        found: list[str | None] = [None] * axis.size
        dist.all_gather_object(found, None if error is None else f"{type(error).__name__}: {error}", group=axis.group)
        if error is None and (where := next((i for i, text in enumerate(found) if text is not None), None)) is not None:
            raise PeerError(f"rank {axis.ranks[where]} failed: {found[where]}")
    if error is not None:
        raise error

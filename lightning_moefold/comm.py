# SPDX-License-Identifier: Apache-2.0
"""The few differentiable collectives of the system, each on local tensors over one :class:`~.mesh.Axis`; and of Python objects.

Every function is the identity (no group, no copy) on an axis of one rank. Each backward is written out: the autograd
registered for torch's functional collectives sums where Megatron's "f" and "g" must not (an all-reduce of an already
equal loss would multiply its gradient by the group size). Uneven exchanges go through ``all_to_all_single``, the one
collective that takes uneven sizes, zero included, on both gloo and NCCL. Collectives that overlap with computation are in
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
from torch.autograd.function import once_differentiable

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
    """Makes a collective, whose last argument is the axis, break the graph of compiled callers; one rank keeps its tensor.

    Within a graph, the compiler could reorder it or remove it if its result is unused, on one rank and not on another.
    """

    @wraps(collective)
    def call(*args: Any) -> T:
        return args[0] if args[-1].size == 1 else uncompiled(collective, *args)

    return call


# ---- plain collectives (no gradient) ---------------------------------------------------------------------------------


@_breaks_graphs
def all_gather_raw(x_ND: Tensor, axis: Axis) -> Tensor:
    """Concatenates tensors of equal length from all ranks: ``[N, D] -> [G*N, D]``."""
    out = x_ND.new_empty((axis.size * x_ND.shape[0], *x_ND.shape[1:]))
    getattr(dist, ALL_GATHER)(out, x_ND.contiguous(), group=axis.group)
    return out


@_breaks_graphs
def reduce_scatter_raw(x_ND: Tensor, axis: Axis) -> Tensor:
    """Sums over ranks and keeps this rank's part: ``[G*N, D] -> [N, D]``."""
    out = x_ND.new_empty((x_ND.shape[0] // axis.size, *x_ND.shape[1:]))
    getattr(dist, REDUCE_SCATTER)(out, x_ND.contiguous(), group=axis.group)
    return out


@_breaks_graphs
def all_reduce_raw(x: Tensor, axis: Axis) -> Tensor:
    """Sums ``x`` over the ranks of ``axis``, in place."""
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


def _back(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
    return ctx.adjoint(grads[0]), None, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, forward: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.adjoint = adjoint
        return forward(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # With create_graph=True: a second derivative is an error, and not silently zero.
            found: tuple[Tensor, None, None] = once_differentiable(_back)(ctx, *grads)
            return found
        return _back(ctx, *grads)


def linear(x: Tensor, forward: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor]) -> Tensor:
    """``forward(x)`` of a linear step whose gradients go back by ``adjoint``, its transpose."""
    return _Linear.apply(x, forward, adjoint)


@_breaks_graphs
def all_gather(x_ND: Tensor, axis: Axis) -> Tensor:
    """All-gathers ``[N, D] -> [G*N, D]``; backward sums the ranks' gradients and keeps this rank's part (reduce-scatter)."""
    return linear(x_ND, lambda x: all_gather_raw(x, axis), lambda grad: reduce_scatter_raw(grad, axis))


@_breaks_graphs
def reduce_scatter(x_ND: Tensor, axis: Axis) -> Tensor:
    """Reduce-scatters ``[G*N, D] -> [N, D]``: sums over ranks and keeps this rank's part; backward is an all-gather."""
    return linear(x_ND, lambda x: reduce_scatter_raw(x, axis), lambda grad: all_gather_raw(grad, axis))


def _part(x_ND: Tensor, axis: Axis) -> Tensor:
    rows = x_ND.shape[0] // axis.size
    return x_ND.narrow(0, axis.index * rows, rows)


@_breaks_graphs
def gather_identical(x_ND: Tensor, axis: Axis) -> Tensor:
    """All-gathers ``[N, D] -> [G*N, D]`` for ranks that then compute the same: backward keeps this rank's part, unsummed."""
    return linear(x_ND, lambda x: all_gather_raw(x, axis), lambda grad: _part(grad, axis).contiguous())


@_breaks_graphs
def split_identical(x_ND: Tensor, axis: Axis) -> Tensor:
    """Keeps this rank's part of a tensor that every rank has, ``[G*N, D] -> [N, D]``; backward is an all-gather."""
    return linear(x_ND, lambda x: _part(x, axis).clone(), lambda grad: all_gather_raw(grad, axis))


@_breaks_graphs
def all_to_all(x_ND: Tensor, send: Counts, receive: Counts, axis: Axis) -> Tensor:
    """All-to-all-v, ``[sum(send), D] -> [sum(receive), D]``; backward sends the gradients back."""
    return linear(
        x_ND, lambda x: all_to_all_raw(x, send, receive, axis), lambda grad: all_to_all_raw(grad, receive, send, axis)
    )


@_breaks_graphs
def all_gather_uneven(x_ND: Tensor, counts: Counts, axis: Axis) -> Tensor:
    """All-gather-v, ``[counts[me], D] -> [sum(counts), D]``; backward is :func:`reduce_scatter_uneven`."""
    return linear(
        x_ND,
        lambda x: all_gather_uneven_raw(x, counts, axis),
        lambda grad: reduce_scatter_uneven_raw(grad, counts, axis),
    )


@_breaks_graphs
def reduce_scatter_uneven(x_ND: Tensor, counts: Counts, axis: Axis) -> Tensor:
    """Reduce-scatter-v, ``[sum(counts), D] -> [counts[me], D]``; backward is :func:`all_gather_uneven`."""
    return linear(
        x_ND,
        lambda x: reduce_scatter_uneven_raw(x, counts, axis),
        lambda grad: all_gather_uneven_raw(grad, counts, axis),
    )


# ---- Python objects --------------------------------------------------------------------------------------------------


def all_gather_objects(value: Any, axis: Axis) -> list[Any]:
    """Returns the objects of all ranks, in their order."""
    everyone = [value] * axis.size
    if axis.size > 1:
        dist.all_gather_object(everyone, value, group=axis.group)
    return everyone


def gather_objects(value: Any, axis: Axis) -> list[Any]:
    """Returns the objects of all ranks on the first one, and nothing on the others."""
    everyone = [value] * axis.size if axis.index == 0 else None
    if axis.size > 1:
        dist.gather_object(value, everyone, dst=axis.ranks[0], group=axis.group)
    return everyone or []


def broadcast_object(value: T, axis: Axis) -> T:
    """Returns the first rank's object."""
    box = [value]
    if axis.size > 1:
        dist.broadcast_object_list(box, src=axis.ranks[0], group=axis.group)
    return box[0]

# SPDX-License-Identifier: Apache-2.0
"""Collectives that run while the rank computes, in forward and in backward.

:func:`start` starts a collective and :func:`wait` waits for it. Autograd runs backward in the opposite order: the backward of
``wait`` starts the collective of the gradients, and the backward of ``start`` waits for it. So what is computed between the two
in forward is differentiated between them in backward, and communication hides behind computation both times.

On NCCL an asynchronous collective runs on its own stream, and a wait makes the current stream wait, not the host. NCCL
runs the collectives of a group in order, so a small one that is needed at once would wait for a large one started
before it. Therefore all tensors that go to the same ranks are started together, under one handle.

Legend: N, M rows before and after; G ranks of the axis; D any trailing dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_moefold.comm import ALL_GATHER, REDUCE_SCATTER, Counts
from lightning_moefold.mesh import Axis


class Route(Protocol):
    """The collective that sends one tensor.

    Attributes:
        kind: Name of the collective.
    """

    kind: ClassVar[str]

    def start(self, x_ND: Tensor, axis: Axis) -> tuple[dist.Work, Tensor]:
        """Starts the collective and returns its work and output; the output must not be read before the work is done."""
        ...

    def finish(self, out: Tensor, axis: Axis) -> Tensor:
        """Returns the received tensor, given the output of :meth:`start`: by default all of it."""
        return out

    def back(self) -> Route:
        """Returns the route of the gradients, which travel in the opposite direction."""
        ...


def _written(out: Tensor) -> Tensor:
    """Returns a view of the same memory that a collective can write to without autograd noticing.

    gloo copies received data on its own thread, at any moment before the wait. If FSDP2 has made a view of ``out`` in
    the meantime, autograd would refuse that view.
    """
    return out.data


@dataclass(frozen=True)
class Exchange(Route):
    """All-to-all-v, ``[sum(send), D] -> [sum(receive), D]``, with so many rows to and from each rank."""

    send: Counts
    receive: Counts
    kind: ClassVar[str] = "all-to-all"

    def start(self, x_ND: Tensor, axis: Axis) -> tuple[dist.Work, Tensor]:
        """See :class:`Route`."""
        out = x_ND.new_empty((sum(self.receive), *x_ND.shape[1:]))
        send, receive = list(self.send), list(self.receive)
        return dist.all_to_all_single(_written(out), x_ND, receive, send, group=axis.group, async_op=True), out

    def back(self) -> Exchange:
        """Returns the all-to-all with send and receive counts exchanged."""
        return Exchange(self.receive, self.send)


@dataclass(frozen=True)
class Spread(Route):
    """All-gather-v, ``[counts[me], D] -> [sum(counts), D]``, with so many rows of each rank."""

    counts: Counts
    kind: ClassVar[str] = "all-gather"

    def start(self, x_ND: Tensor, axis: Axis) -> tuple[dist.Work, Tensor]:
        """See :class:`Route`."""
        if len(set(self.counts)) > 1:
            repeated = x_ND.repeat(axis.size, *[1] * (x_ND.dim() - 1))
            return Exchange([x_ND.shape[0]] * axis.size, self.counts).start(repeated, axis)
        out = x_ND.new_empty((sum(self.counts), *x_ND.shape[1:]))
        return getattr(dist, ALL_GATHER)(_written(out), x_ND, group=axis.group, async_op=True), out

    def back(self) -> SumUp:
        """Returns the reduce-scatter that sums the gradients of all ranks."""
        return SumUp(self.counts)


@dataclass(frozen=True)
class SumUp(Route):
    """Reduce-scatter-v, ``[sum(counts), D] -> [counts[me], D]``, with so many rows for each rank."""

    counts: Counts
    kind: ClassVar[str] = "reduce-scatter"

    def start(self, x_ND: Tensor, axis: Axis) -> tuple[dist.Work, Tensor]:
        """See :class:`Route`."""
        mine = self.counts[axis.index]
        if len(set(self.counts)) > 1:
            return Exchange(self.counts, [mine] * axis.size).start(x_ND, axis)
        out = x_ND.new_empty((mine, *x_ND.shape[1:]))
        return getattr(dist, REDUCE_SCATTER)(_written(out), x_ND, group=axis.group, async_op=True), out

    def finish(self, out: Tensor, axis: Axis) -> Tensor:
        """Returns the sum of the parts received from all ranks."""
        if len(set(self.counts)) == 1:
            return out
        return out.view(axis.size, self.counts[axis.index], *out.shape[1:]).sum(0)

    def back(self) -> Spread:
        """Returns the all-gather that gives the gradients to all ranks."""
        return Spread(self.counts)


def _nothing() -> None:
    pass


class Handle:
    """Tensors that are sent together: their routes, the memory they read and write, and the pending work.

    Args:
        routes: The route of each tensor.
        axis: The ranks that exchange them.
        yields: Whether another pass may take its turn at this wait. False where the data decide whether there is a wait: passes
            take turns in the same way on all ranks of a stage, which have different data.

    Attributes:
        before_waiting: Called when a pass is about to wait, so that another pass can compute meanwhile
            (:mod:`.parallel.pipeline.paired_passes`).
    """

    before_waiting: Callable[[], None] = staticmethod(_nothing)

    def __init__(self, routes: Sequence[Route], axis: Axis, *, yields: bool = True) -> None:
        self.routes, self.axis, self.yields = tuple(routes), axis, yields
        self._pending: list[tuple[Route, dist.Work, Tensor, Tensor]] = []
        self._stream: Any = None

    def start(self, tensors: Sequence[Tensor | None], *, back: bool = False) -> list[Tensor | None]:
        """Starts sending the tensors that are not None; the results must not be read before :meth:`wait`.

        Args:
            tensors: One tensor or None for each route.
            back: Whether these are gradients, which travel the other way.
        """
        outs: list[Tensor | None] = []
        for route, x_ND in zip(self.routes, tensors, strict=True):
            if x_ND is None:
                outs.append(None)
                continue
            x_ND, way = x_ND.contiguous(), route.back() if back else route
            work, out = way.start(x_ND, self.axis)
            self._pending.append((way, work, x_ND, out))  # both tensors must live until the work is done
            self._stream = torch.cuda.current_stream(x_ND.device) if x_ND.is_cuda else None
            outs.append(out)
        return outs

    def wait(self) -> list[Tensor]:
        """Waits for the latest start and returns the received tensors. On CUDA the current stream waits, not the host."""
        if self.yields:
            Handle.before_waiting()
        arrived = []
        for way, work, x_ND, out in self._pending:
            work.wait()
            if self._stream is not None:
                self._keep_for(torch.cuda.current_stream(out.device), x_ND, out)
            arrived.append(way.finish(out, self.axis))
        self._pending = []
        return arrived

    def _keep_for(self, stream: Any, *tensors: Tensor) -> None:
        """Keeps the tensors' memory until ``stream``, which waited but did not start the collective, has finished with them."""
        if stream != self._stream:
            for tensor in tensors:
                tensor.record_stream(stream)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, handle: Handle, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.handle = handle
        ctx.needed = ctx.needs_input_grad[1:]
        outs = handle.start([x.detach() for x in tensors])
        promised = tuple(out for out in outs if out is not None)
        ctx.mark_non_differentiable(*(out for out, needed in zip(promised, ctx.needed, strict=True) if not needed))
        return promised

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        arrived = iter(ctx.handle.wait())
        return None, *(next(arrived) if needed else None for needed in ctx.needed)


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, handle: Handle, *promised: Tensor) -> tuple[Tensor, ...]:
        ctx.handle, ctx.shapes, ctx.needed = handle, [out.shape for out in promised], ctx.needs_input_grad[1:]
        arrived = tuple(out.view_as(out) for out in handle.wait())
        ctx.mark_non_differentiable(*(x for x, needed in zip(arrived, ctx.needed, strict=True) if not needed))
        return arrived

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.handle.start([g if needed else None for g, needed in zip(grads, ctx.needed, strict=True)], back=True)
        # The gradients have not arrived yet, but autograd expects tensors of the promised shapes.
        stand_ins = (g.new_zeros(()).expand(shape) for g, shape in zip(grads, ctx.shapes, strict=True))
        return None, *(x if needed else None for x, needed in zip(stand_ins, ctx.needed, strict=True))


def start(
    tensors: Sequence[Tensor], routes: Sequence[Route], axis: Axis, *, yields: bool = True
) -> tuple[tuple[Tensor, ...], Handle | None]:
    """Starts collectives that :func:`wait` ends.

    Args:
        tensors: Tensors to send; their gradients travel back.
        routes: The collective for each tensor.
        axis: The ranks that exchange them.
        yields: See :class:`Handle`.

    Returns:
        Tensors that must not be read yet, and the handle to pass to :func:`wait` with them. On an axis of one rank, the
        tensors themselves and None.
    """
    if axis.size == 1:
        return tuple(tensors), None
    handle = Handle(routes, axis, yields=yields)
    return _Start.apply(handle, *tensors), handle


def wait(promised: Sequence[Tensor], handle: Handle | None) -> tuple[Tensor, ...]:
    """Waits for the collectives that :func:`start` started, and returns the received tensors."""
    return tuple(promised) if handle is None else _Wait.apply(handle, *promised)

# SPDX-License-Identifier: Apache-2.0
"""Gradient sums that FSDP2 does not do.

These are partial gradients over tp (of experts' adapters over etp), those of whatever is replicated over data ranks, and those of
weights that two stages share. FSDP2 sums all others, those of experts over edp (:mod:`.roots`).

All of them are summed together in a few flat collectives after backward, on the pieces that each rank stores, rather
than in one small collective per parameter inside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_moefold import comm
from lightning_moefold.mesh import Axis

_BUCKET_ELEMENTS = 16 * 1024 * 1024


def local_part(tensor: Tensor) -> Tensor:
    """This rank's piece, without a copy and outside autograd."""
    detached = tensor.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached


class GradientSum:
    """Completes gradients after each backward.

    Args:
        members: Parameters and the axis over which the gradient of each is summed.

    Attributes:
        deferred: While true, backward leaves its gradients unsummed; the next backward for which it is false sums them
            with its own (gradient accumulation).
    """

    def __init__(self, members: Iterable[tuple[nn.Parameter, Axis]]) -> None:
        self._by_axis: dict[str, tuple[Axis, list[nn.Parameter]]] = {}
        for parameter, axis in members:
            if axis.size > 1:
                self._by_axis.setdefault(axis.name, (axis, []))[1].append(parameter)
        self.deferred = False
        self._unsummed: set[nn.Parameter] = set()  # those that a deferred backward may have given gradients
        self._summed: dict[nn.Parameter, Tensor] = {}

    @contextmanager
    def around_backward(self) -> Iterator[None]:
        """Sums the gradients that the backward inside adds; those of earlier ones are sums already and stay as they are."""
        if not self._unsummed:
            self._set_aside()
        try:
            yield
            members = [p for _, group in self._by_axis.values() for p in group]
            self._unsummed |= {p for p in members if p.requires_grad}
            if not self.deferred:
                # Also those that are frozen by now (toggled off, with several optimizers).
                for axis, group in self._by_axis.values():
                    self._sum([p for p in group if p in self._unsummed], axis)
                self._unsummed.clear()
        finally:
            if not self._unsummed:
                self._put_back()

    def _set_aside(self) -> None:
        members = [p for _, group in self._by_axis.values() for p in group]
        self._summed = {p: p.grad for p in members if p.grad is not None}
        for parameter in self._summed:
            parameter.grad = None

    def _put_back(self) -> None:
        for parameter, grad in self._summed.items():
            parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
        self._summed = {}

    def _sum(self, members: list[nn.Parameter], axis: Axis) -> None:
        bucket: list[nn.Parameter] = []
        size = 0
        for parameter in members:
            bucket.append(parameter)
            size += local_part(parameter).numel()
            if size >= _BUCKET_ELEMENTS:
                self._sum_bucket(bucket, axis)
                bucket, size = [], 0
        self._sum_bucket(bucket, axis)

    @staticmethod
    def _sum_bucket(members: list[nn.Parameter], axis: Axis) -> None:
        """One all-reduce, in at least float32, of the same length on every rank whichever gradients exist on it.

        A parameter may be out of use on one rank and in use on another: it counts as zero there, and a flag for each
        parameter tells whether anybody has a gradient for it.
        """
        if not members:
            return
        pieces = [local_part(p) for p in members]
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in pieces) else torch.float32
        complete = all(p.grad is not None for p in members)
        flags = torch.ones(len(members), dtype=dtype, device=pieces[0].device)
        if not complete:
            flags = torch.tensor([p.grad is not None for p in members]).to(flags, non_blocking=True)
        grads = [
            torch.zeros_like(x) if p.grad is None else local_part(p.grad) for p, x in zip(members, pieces, strict=True)
        ]
        flat = torch.cat([flags, *(g.reshape(-1).to(dtype) for g in grads)])
        comm.all_reduce_raw(flat, axis)
        # The flags are read (which waits for the device) only where this rank lacks a gradient.
        present = [1.0] * len(members) if complete else flat[: len(members)].tolist()
        parts = flat[len(members) :].split([g.numel() for g in grads])
        for parameter, grad, part, anybody in zip(members, grads, parts, present, strict=True):
            if anybody:
                grad.copy_(part.view_as(grad))
                if parameter.grad is None:
                    parameter.grad = like(parameter, grad)


def like(parameter: Tensor, piece: Tensor) -> Tensor:
    """A piece as what the parameter stores: a DTensor of its placements, or the plain tensor itself."""
    if not isinstance(parameter, DTensor):
        return piece
    return DTensor.from_local(
        piece,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )

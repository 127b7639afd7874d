# SPDX-License-Identifier: Apache-2.0
"""Gradient sums that FSDP2 does not do: partial gradients over tp, and modules of the user's own over data ranks.

All of them are summed together in a few flat collectives after backward, on the pieces that each rank stores, rather than
in one small collective per parameter inside it.
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
        members: Parameters, the axis over which the gradient of each is summed, and whether a backward that reaches the
            parameter on one rank of the axis reaches it on all.
    """

    def __init__(self, members: Iterable[tuple[nn.Parameter, Axis, bool]]) -> None:
        self._by_axis: dict[tuple[str, bool], tuple[Axis, list[nn.Parameter]]] = {}
        for parameter, axis, together in members:
            if axis.size > 1:
                self._by_axis.setdefault((axis.name, together), (axis, []))[1].append(parameter)

    @contextmanager
    def around_backward(self) -> Iterator[None]:
        """Sums the gradients that the backward inside adds; those of earlier ones are sums already and stay as they are."""
        earlier = {p: p.grad for _, members in self._by_axis.values() for p in members if p.grad is not None}
        for parameter in earlier:
            parameter.grad = None
        try:
            yield
            for (_, together), (axis, members) in self._by_axis.items():
                self._sum([p for p in members if (p.grad is not None if together else p.requires_grad)], axis)
        finally:
            for parameter, grad in earlier.items():
                parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)

    def _sum(self, members: list[nn.Parameter], axis: Axis) -> None:
        for dtype in sorted({p.dtype for p in members}, key=str):  # in an order that all ranks share
            bucket: list[nn.Parameter] = []
            elements = 0
            for parameter in (p for p in members if p.dtype == dtype):
                bucket.append(parameter)
                elements += local_part(parameter).numel()
                if elements >= _BUCKET_ELEMENTS:
                    self._sum_bucket(bucket, axis)
                    bucket, elements = [], 0
            self._sum_bucket(bucket, axis)

    @staticmethod
    def _sum_bucket(members: list[nn.Parameter], axis: Axis) -> None:
        """One all-reduce of gradients and of a flag for each, whether there is one.

        A branch in the user's module may leave a parameter without a gradient on some ranks; the collective is the same on
        all of them, and the parameter stays without a gradient only where no rank has one.
        """
        if not members:
            return
        grads = [torch.zeros_like(local_part(p)) if p.grad is None else local_part(p.grad) for p in members]
        present = grads[0].new_tensor([p.grad is not None for p in members])
        flat = torch.cat([*(g.reshape(-1) for g in grads), present])
        comm.all_reduce_raw(flat, axis)
        *sums, present = flat.split([*(g.numel() for g in grads), len(members)])
        for grad, part in zip(grads, sums, strict=True):
            grad.copy_(part.view_as(grad))
        absent = [(i, p) for i, p in enumerate(members) if p.grad is None]
        if absent:
            reached = present.tolist()
            for i, parameter in absent:
                parameter.grad = grads[i] if reached[i] else None

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
        members: Parameters and the axis over which the gradient of each is summed.
    """

    def __init__(self, members: Iterable[tuple[nn.Parameter, Axis]]) -> None:
        self._by_axis: dict[str, tuple[Axis, list[nn.Parameter]]] = {}
        for parameter, axis in members:
            if axis.size > 1 and parameter.requires_grad:
                self._by_axis.setdefault(axis.name, (axis, []))[1].append(parameter)

    @contextmanager
    def around_backward(self) -> Iterator[None]:
        """Sums the gradients that the backward inside adds; those of earlier ones are sums already and stay as they are."""
        earlier = {p: p.grad for _, members in self._by_axis.values() for p in members if p.grad is not None}
        for parameter in earlier:
            parameter.grad = None
        try:
            yield
            for axis, members in self._by_axis.values():
                self._sum([p.grad for p in members if p.grad is not None], axis)
        finally:
            for parameter, grad in earlier.items():
                parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)

    def _sum(self, grads: list[Tensor], axis: Axis) -> None:
        for dtype in sorted({g.dtype for g in grads}, key=str):  # in an order that all ranks share
            bucket: list[Tensor] = []
            for grad in (local_part(g) for g in grads if g.dtype == dtype):
                bucket.append(grad)
                if sum(g.numel() for g in bucket) >= _BUCKET_ELEMENTS:
                    self._sum_bucket(bucket, axis)
                    bucket = []
            self._sum_bucket(bucket, axis)

    @staticmethod
    def _sum_bucket(grads: list[Tensor], axis: Axis) -> None:
        if not grads:
            return
        flat = torch.cat([g.reshape(-1) for g in grads])
        comm.all_reduce_raw(flat, axis)
        for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(part.view_as(grad))

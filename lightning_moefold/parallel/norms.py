# SPDX-License-Identifier: Apache-2.0
"""The norm of all gradients across both meshes, every logical parameter counted once, and clipping by it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_moefold import comm
from lightning_moefold.parallel.gradients import local_part
from lightning_moefold.parallel.parameters import ParameterRegistry


class GradientNorm:
    """Global L2 norm, and clipping by it.

    Args:
        registry: Which parameter is which, and which rank counts a piece (replicas count once).
        device: Where to reduce.

    Attributes:
        by_family: Norms of the dense and of the expert family when the total was last taken, ``[2]``; else None.
    """

    def __init__(self, registry: ParameterRegistry, device: torch.device) -> None:
        self._registry, self._device = registry, device
        self.by_family: Tensor | None = None

    @torch.no_grad()
    def total(self, parameters: list[nn.Parameter]) -> Tensor:
        """L2 norm over all ranks, the same bits on each; a scalar in float64. Collective."""
        squares = torch.zeros(2, dtype=torch.float64, device=self._device)
        owned = [p for p in parameters if p.grad is not None and self._registry.counts_here(p)]
        for family in (0, 1):
            grads = [local_part(p.grad) for p in owned if p.grad is not None and self._registry.is_expert(p) == family]
            for dtype in {g.dtype for g in grads}:
                wide = torch.promote_types(dtype, torch.float32)
                norms = torch._foreach_norm([g for g in grads if g.dtype == dtype], 2, dtype=wide)
                squares[family] += torch.stack([n.double() for n in norms]).square().sum()
        comm.all_reduce_raw(squares, self._registry.mesh.world)
        self.by_family = squares.sqrt()
        return squares.sum().sqrt()

    @torch.no_grad()
    def clip(self, parameters: list[nn.Parameter], max_norm: float) -> Tensor:
        """Scales all gradients so that their norm is at most ``max_norm`` (torch's formula); returns the norm before."""
        norm = self.total(parameters)
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        grads = [local_part(p.grad) for p in parameters if p.grad is not None]
        for dtype in {g.dtype for g in grads}:
            torch._foreach_mul_([g for g in grads if g.dtype == dtype], factor.to(dtype))
        return norm

# SPDX-License-Identifier: Apache-2.0
"""Checks before each optimizer step whether losses and gradients are finite; all ranks learn the result in one sum.

The check runs after backward and before clipping, which would spread a NaN over all gradients. A step that fails it ends with
:class:`NotFinite` inside ``Optimizer.step``, before the optimizer has touched a weight, a moment or a master.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_moefold import comm
from lightning_moefold.diagnostics.first_bad import all_finite
from lightning_moefold.mesh import FoldedMesh
from lightning_moefold.parallel.gradients import local_part


@dataclass(frozen=True)
class StepNumbers:
    """What all ranks know of an optimizer step.

    Args:
        gradients_are_finite: Whether all gradients are, on all ranks.
        losses_are_finite: Whether the losses of all batches of the step are, on all ranks.
        loss_D: Loss of the step by data rank, as Lightning's closure has it; 0 where it is not finite.
    """

    gradients_are_finite: bool
    losses_are_finite: bool
    loss_D: tuple[float, ...]

    @property
    def are_finite(self) -> bool:
        """Whether the step can be made."""
        return self.gradients_are_finite and self.losses_are_finite


class NotFinite(Exception):
    """Ends an optimizer step that must not be made. Caught by the strategy on every rank."""

    def __init__(self, optimizer: Any, numbers: StepNumbers) -> None:
        super().__init__("a loss or gradient is not finite")
        self.optimizer, self.numbers = optimizer, numbers


class StepCheck:
    """The check of one fit.

    Args:
        mesh: The folded mesh.
        device: This rank's device.
        passed: Called with the numbers of a step that is made.
        failed: Called on all ranks, outside of the optimizer, when a step is not made; raises to stop the run.
    """

    def __init__(
        self,
        mesh: FoldedMesh,
        device: torch.device,
        passed: Callable[[StepNumbers], None],
        failed: Callable[[NotFinite], None],
    ) -> None:
        self._mesh, self._device, self._passed, self.failed = mesh, device, passed, failed
        self._losses: list[Tensor] = []

    def saw_loss(self, loss: Tensor) -> None:
        """Notes the loss of a batch of the step, before its backward."""
        self._losses.append(loss.detach())

    @torch.no_grad()
    def __call__(self, optimizer: Any, parameters: Sequence[nn.Parameter]) -> None:
        """Checks the step that ``optimizer`` is about to make. Collective; waits for the device.

        Raises:
            NotFinite: If a loss or gradient is not finite on any rank; raised on all ranks.
        """
        numbers = self._numbers(parameters)
        self._losses = []
        if not numbers.are_finite:
            raise NotFinite(optimizer, numbers)
        self._passed(numbers)

    def _numbers(self, parameters: Sequence[nn.Parameter]) -> StepNumbers:
        place, dp = self._mesh.place, self._mesh.fold.dp
        votes = torch.zeros(2 + dp, dtype=torch.float64, device=self._device)
        finite = all_finite([local_part(p.grad) for p in parameters if p.grad is not None])
        if finite is not None:
            votes[0] = (~finite).double()
        if self._losses:
            loss = torch.stack([loss.double().sum() for loss in self._losses]).sum().to(self._device)
            votes[1] = (~loss.isfinite()).double()
            if all(place[axis] == 0 for axis in ("tp", "cp", "pp")):
                votes[2 + place["dp"]] = loss.nan_to_num(0.0, 0.0, 0.0)
        gradients, losses, *loss_D = comm.all_reduce_raw(votes, self._mesh.world).tolist()
        return StepNumbers(not gradients, not losses, tuple(loss_D))

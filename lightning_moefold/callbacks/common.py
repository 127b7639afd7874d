# SPDX-License-Identifier: Apache-2.0
"""What the monitors share: when to log, over which ranks, and how."""

from __future__ import annotations

from collections.abc import Mapping

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from lightning_moefold.errors import InputError
from lightning_moefold.mesh import SINGLE, Axis
from lightning_moefold.strategy import MoEFoldStrategy


class LogSchedule:
    """Counts optimizer steps, and says which of them are to be logged; the same answer on every rank.

    Args:
        every_n_steps: Log after this many optimizer steps; None for the Trainer's ``log_every_n_steps``.

    Raises:
        ValueError: If ``every_n_steps`` is not positive.
    """

    def __init__(self, every_n_steps: int | None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise InputError(f"log_every_n_steps={every_n_steps} must be at least 1, or None for the Trainer's.")
        self.every_n_steps = every_n_steps
        self._step = self._previous = 0

    def start(self, trainer: pl.Trainer) -> None:
        """Begins to count where the Trainer stands, which after a restart is not zero."""
        self._step = self._previous = trainer.global_step

    def step_ended(self, trainer: pl.Trainer) -> bool:
        """Whether an optimizer step was made since the last call; to be asked once at the end of each batch."""
        self._previous, self._step = self._step, trainer.global_step
        return self._step > self._previous

    def is_due(self, trainer: pl.Trainer) -> bool:
        """Whether the step that just ended is to be logged."""
        if self.every_n_steps is None:
            # Private, but what Lightning's own monitors ask; it holds from the start to the end of a batch.
            return trainer._logger_connector.should_update_logs
        return self._step // self.every_n_steps > self._previous // self.every_n_steps


def world_axis(trainer: pl.Trainer) -> Axis:
    """All ranks, under whichever strategy."""
    strategy = trainer.strategy
    if isinstance(strategy, MoEFoldStrategy):
        return strategy.mesh.world
    if trainer.world_size == 1 or not dist.is_available() or not dist.is_initialized():
        return SINGLE
    return Axis("world", tuple(range(trainer.world_size)), trainer.global_rank, dist.group.WORLD)


def logged_step(trainer: pl.Trainer) -> int:
    """The step that Lightning gives its own metrics, for what goes to a logger directly."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def log_values(trainer: pl.Trainer, module: pl.LightningModule, values: Mapping[str, float]) -> None:
    """Logs values that are the same on every rank, without communication.

    They are CPU tensors: a float would be copied to the device, one by one, only to be read back by the logger.
    """
    if trainer.barebones:  # refuses to log
        return
    for name, value in values.items():
        tensor = torch.tensor(value, dtype=torch.float64)
        module.log(name, tensor, on_step=True, on_epoch=False, sync_dist=False, rank_zero_only=False, batch_size=1)

# SPDX-License-Identifier: Apache-2.0
"""What the callbacks share: when to log, over which ranks, how, and the files that they write."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from numpy.typing import ArrayLike

from lightning_moefold.checkpoint import stores
from lightning_moefold.errors import InputError
from lightning_moefold.mesh import SINGLE, Axis
from lightning_moefold.strategy import MoEFoldStrategy


class LogSchedule:
    """Counts optimizer steps and decides which of them are logged; the decision is the same on every rank.

    Args:
        every_n_steps: Log after this many optimizer steps; None for the Trainer's ``log_every_n_steps``.

    Raises:
        ValueError: If ``every_n_steps`` is not positive.
    """

    def __init__(self, every_n_steps: int | None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise InputError(f"log_every_n_steps={every_n_steps} must be at least 1, or None for the Trainer's.")
        self.every_n_steps = every_n_steps
        self._step = self._previous = self._first = 0

    def start(self, trainer: pl.Trainer) -> None:
        """Starts to count at the Trainer's current step, which is not zero after a restart."""
        self._step = self._previous = self._first = trainer.global_step

    def step_ended(self, trainer: pl.Trainer) -> bool:
        """Whether an optimizer step was made since the last call. Must be called once at the end of each batch."""
        self._previous, self._step = self._step, trainer.global_step
        return self._step > self._previous

    def is_due(self, trainer: pl.Trainer) -> bool:
        """Whether the step that just ended is logged."""
        if self.every_n_steps is None:
            # Private, but Lightning's own monitors use it; it is valid from the start to the end of a batch.
            return trainer._logger_connector.should_update_logs
        return self._step // self.every_n_steps > self._previous // self.every_n_steps

    def explain_silence(self, trainer: pl.Trainer, monitor: pl.Callback) -> None:
        """Warns at the end of a fit of which no step was logged, and says why."""
        every = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        made = trainer.global_step - self._first
        if made and not trainer.barebones and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(
                f"{type(monitor).__name__} has logged nothing: it logs every {every} optimizer steps, and this fit made {made}; "
                "lower log_every_n_steps."
            )


def fold_strategy(trainer: pl.Trainer) -> MoEFoldStrategy:
    """Returns the strategy of a Trainer that is known to have a MoEFoldStrategy."""
    assert isinstance(trainer.strategy, MoEFoldStrategy)
    return trainer.strategy


def world_axis(trainer: pl.Trainer) -> Axis:
    """Returns the axis of all ranks, under any strategy."""
    strategy = trainer.strategy
    if isinstance(strategy, MoEFoldStrategy):
        return strategy.mesh.world
    if trainer.world_size == 1 or not dist.is_available() or not dist.is_initialized():
        return SINGLE
    return Axis("world", tuple(range(trainer.world_size)), trainer.global_rank, dist.group.WORLD)


def logged_step(trainer: pl.Trainer) -> int:
    """Returns the step under which Lightning logs its own metrics, for values that are passed to a logger directly."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def log_file(trainer: pl.Trainer, name: str) -> Path | str | None:
    """Returns the path of a file in ``log_dir``, or None if nothing is logged. Broadcasts, so every rank has to call it."""
    if not trainer.loggers or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    folder = trainer.log_dir
    return None if folder is None else stores.join(stores.parse_path(folder), name)


def save_arrays(path: Path | str, arrays: Mapping[str, ArrayLike]) -> None:
    """Writes arrays to an ``.npz`` file, here or in a store, atomically."""
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    stores.write(path, file.getvalue())


def log_values(trainer: pl.Trainer, module: pl.LightningModule, values: Mapping[str, float]) -> None:
    """Logs values that are the same on every rank, without communication.

    Values are logged as CPU tensors, because each float would be copied to the device and then read back by the logger.
    """
    if trainer.barebones:  # a barebones Trainer refuses to log
        return
    for name, value in values.items():
        tensor = torch.tensor(value, dtype=torch.float64)
        module.log(name, tensor, on_step=True, on_epoch=False, sync_dist=False, rank_zero_only=False, batch_size=1)

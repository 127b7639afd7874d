# SPDX-License-Identifier: Apache-2.0
"""SaveOnInterrupt: Ctrl-C and SIGTERM end a run with a checkpoint, one line, and an exit status that says so.

A signal may reach some ranks and not others, or all of them at different moments, and a checkpoint is collective. So all ranks
agree after which batch they stop (:class:`~lightning_moefold.lifecycle.signals.SameBatch`).
"""

from __future__ import annotations

import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override

from lightning_moefold.checkpoint import stores
from lightning_moefold.lifecycle.signals import SameBatch, requeue_signal
from lightning_moefold.strategy import MoEFoldStrategy

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
#: A second Ctrl-C within so many seconds is the first one, passed on by the process that has started this one.
_SAME = 1.0


class SaveOnInterrupt(pl.Callback):
    """Stops a run in order when the user or the scheduler interrupts it.

    On Ctrl-C (SIGINT) or SIGTERM, on whatever rank, all ranks finish the same optimizer step, write ``last.ckpt`` beside the
    run's other checkpoints, say in one line at which step they stopped and how to resume, and exit with status 130 or 143, by
    which a scheduler knows that the job is not done. A second Ctrl-C ends at once, without a checkpoint. A signal during
    validation is honoured after the next training batches. A signal at which SLURM requeues the job
    (``SLURMEnvironment(requeue_signal=...)``) does so instead. ``moefold fit`` has this callback unless the configuration has one.

    Args:
        save: Whether to write the checkpoint.

    Attributes:
        signal: The signal received on this rank, or None.
    """

    def __init__(self, save: bool = True) -> None:
        super().__init__()
        self.save = save
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._received = 0.0
        self._batch: SameBatch | None = None
        self._trainer: pl.Trainer | None = None

    # ---- signals -----------------------------------------------------------------------------------------------

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.signal, self._trainer = None, trainer
        self._batch = SameBatch(trainer, "moefold/interrupt")
        for number in _SIGNALS:
            if number == requeue_signal(trainer):
                continue
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:  # not in the main thread, where signals do not arrive
                return

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            if number == signal.SIGINT and time.monotonic() - self._received > _SAME:
                raise KeyboardInterrupt
            return
        self.signal, self._received = signal.Signals(number), time.monotonic()
        launcher = None if self._trainer is None else self._trainer.strategy.launcher
        if launcher is not None:
            launcher.kill(number)

    def _restore(self, *_: Any, **__: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not installed by Python
        self._before.clear()
        self._trainer = None

    on_train_end = on_exception = _restore

    # ---- batches -----------------------------------------------------------------------------------------------

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any, **__: Any) -> None:
        told = None if self._batch is None else self._batch.ended(self.signal)
        if told is None:
            return
        number = signal.Signals(told)
        path = self._path(trainer) if self.save else None
        if path is not None:
            trainer.save_checkpoint(path)
            if isinstance(trainer.strategy, MoEFoldStrategy):
                trainer.strategy.finish_saves()
        if trainer.is_global_zero:
            why = "the run keeps no checkpoints" if self.save else "save=False"
            how = f"not saved, since {why}" if path is None else f"saved; resume with --ckpt_path {path}"
            print(f"stopped by {number.name} after step {trainer.global_step}, {how}", flush=True)
        raise SystemExit(128 + number)

    @staticmethod
    def _path(trainer: pl.Trainer) -> str | None:
        saver = next((c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)), None)
        if saver is None or saver.dirpath is None:
            return None
        name = saver.format_checkpoint_name(saver._monitor_candidates(trainer), saver.CHECKPOINT_NAME_LAST)
        return str(stores.join(stores.parse_path(saver.dirpath), Path(name).name))

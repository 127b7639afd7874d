# SPDX-License-Identifier: Apache-2.0
"""Signals end or requeue a run at the end of a batch, on whatever rank they arrive.

Lightning's own handlers use collectives from inside the signal handler, possibly in the middle of another one: on SIGTERM it
broadcasts, and on the requeue signal of SLURM it saves a checkpoint. Under a fold the two meet and all ranks hang. Here a
handler only sets a flag, and passes SIGTERM to the processes that this one has launched.

After SIGTERM Lightning checks the flag and stops at the end of the batch; ranks that did not receive the signal lose contact
and end with one line each. After the requeue signal all ranks save after the same batch (:class:`SameBatch`), then Lightning
requeues the job.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback


class SameBatch:
    """Lets all ranks act after the same batch on what any of them was told, at whatever moment.

    Whoever was told something writes into the store of the process group after which batch all ranks act: that which ends the
    optimizer step after the next. No rank can have passed that one, because Lightning tells all ranks before each batch whether
    SIGTERM came, and each waits until it has heard (on CUDA collectives of a step alone would not hold the host). Ranks ask the
    store after each batch, without waiting for a device.

    Args:
        trainer: The Trainer, about to train.
        key: Name in the store.
    """

    def __init__(self, trainer: pl.Trainer, key: str) -> None:
        self._trainer, self._key, self._batches = trainer, key, 0
        if trainer.is_global_zero and self._shared:
            # What an earlier fit of these processes was told. Others ask after their first batch, which needs this rank.
            dist.distributed_c10d._get_default_store().delete_key(key)

    @property
    def _shared(self) -> bool:
        return self._trainer.world_size > 1 and dist.is_initialized()

    def ended(self, told: int | None) -> int | None:
        """Returns on all ranks what one was told if they act after this batch, else None. Called once after each batch.

        ``told`` is what this rank was told, None for nothing.
        """
        self._batches += 1
        accumulates = self._trainer.fit_loop.epoch_loop._should_accumulate()  # gradients of half a step would be lost
        if not self._shared:
            return None if accumulates else told
        store = dist.distributed_c10d._get_default_store()
        if not store.check([self._key]):
            if told is None:
                return None
            # The first rank to write decides for all.
            store.compare_set(self._key, "", f"{self._batches + 2 * self._trainer.accumulate_grad_batches} {told}")
        last, number = store.get(self._key).decode().split()
        return int(number) if self._batches >= int(last) and not accumulates else None


def stop_quietly(trainer: pl.Trainer) -> None:
    """Replaces Lightning's part in the handler of SIGTERM until the Trainer's end; the user's own handlers stay."""
    notifier = trainer._signal_connector._sigterm_notifier_fn
    handlers: list[Any] | None = getattr(signal.getsignal(signal.SIGTERM), "signal_handlers", None)
    if handlers is None:  # not in the main thread, or no such handlers in this Lightning
        return
    handlers[:] = [TakesNote(trainer) if handler == notifier else handler for handler in handlers]


class TakesNote:
    """Takes the place of Lightning's handler that tells other ranks of SIGTERM."""

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer

    def __call__(self, signum: int, _: Any) -> None:
        """Notes the signal, and passes it to the processes that this one has launched."""
        connector, launcher = self._trainer._signal_connector, self._trainer.strategy.launcher
        if not connector.received_sigterm and launcher is not None:
            launcher.kill(signum)
        connector.received_sigterm = True


class RequeueTogether(Callback):
    """Takes the place of Lightning's handler of SLURM's requeue signal, which it calls after a batch on all ranks."""

    def __init__(self, trainer: pl.Trainer, handler: Any) -> None:
        self._handler = handler
        self._told: int | None = None
        self._batch = SameBatch(trainer, "moefold/requeue")
        others = [c for c in trainer.callbacks if not isinstance(c, RequeueTogether)]  # type: ignore[attr-defined]
        trainer.callbacks = [self, *others]  # type: ignore[attr-defined]

    def __call__(self, signum: int, _: Any) -> None:
        """Notes the signal."""
        self._told = int(signum)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        """Saves and requeues once, if a rank was told to."""
        if self._handler is not None and (number := self._batch.ended(self._told)) is not None:
            handler, self._handler = self._handler, None
            handler(number, None)
            if number == signal.SIGTERM:  # Lightning then stops after this batch
                trainer._signal_connector.received_sigterm = True


def requeue_together(trainer: pl.Trainer) -> None:
    """Replaces Lightning's handler of the requeue signal, where SLURM is to requeue jobs; the user's own handlers stay.

    If the signal is SIGTERM, it no longer stops the run at once, but when all ranks have saved and the job is requeued.
    """
    connector, number = trainer._signal_connector, requeue_signal(trainer)
    if number is None:
        return
    outer, ours = signal.getsignal(number), connector._slurm_sigusr_handler_fn
    handlers = _handlers_with(outer, ours)
    handlers[:] = [RequeueTogether(trainer, ours) if handler == ours else handler for handler in handlers]
    notifier = connector._sigterm_notifier_fn
    for handlers in _all_handlers(outer):  # a validation before training may have replaced it
        handlers[:] = [h for h in handlers if h != notifier and not isinstance(h, TakesNote)]


def requeue_signal(trainer: pl.Trainer) -> int | None:
    """Returns the signal at which Lightning requeues the SLURM job of this process, or None if there is none."""
    number: int | None = getattr(trainer._accelerator_connector.cluster_environment, "requeue_signal", None)
    ours = trainer._signal_connector._slurm_sigusr_handler_fn
    return number if number is not None and _handlers_with(signal.getsignal(number), ours) else None


def _handlers_with(composed: Any, wanted: Any) -> list[Any]:
    """Returns the list that holds a handler, of handlers that Lightning has composed, perhaps of composed ones; or an empty one."""
    return next((handlers for handlers in _all_handlers(composed) if wanted in handlers), [])


def _all_handlers(composed: Any) -> Iterator[list[Any]]:
    """Yields the lists of handlers that Lightning has composed, the outermost first."""
    handlers: list[Any] = getattr(composed, "signal_handlers", [])
    if handlers:
        yield handlers
    for handler in list(handlers):
        yield from _all_handlers(handler)

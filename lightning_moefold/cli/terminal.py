# SPDX-License-Identifier: Apache-2.0
"""Terminal output of a run: shows progress, and silences advice that does not apply."""

from __future__ import annotations

import logging
import math
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ProgressBar, TQDMProgressBar


def quiet() -> None:
    """Silences messages that do not help the user: tips, device lists, advice on data loading."""
    for name in (
        "pytorch.utilities.rank_zero",
        "pytorch.trainer.connectors.signal_connector",  # SIGTERM to peers
        "fabric.utilities.distributed",
        "fabric.utilities.seed",
    ):
        logging.getLogger(f"lightning.{name}").setLevel(logging.WARNING)
    for pattern in (
        ".*`tensorboardX` has been removed",
        ".*does not have many workers",  # the data is in memory
        ".*ouldn.t infer the batch indices",  # there is no DataLoader
        ".*smaller than the logging interval",
        ".*Using `DistributedSampler` with the dataloaders",
        ".*sync_dist=True",  # the loss is that of all ranks already
        ".*isinstance.treespec, LeafSpec",  # a matter between Lightning and torch, like the next one
        ".*nn.functional.all_gather is deprecated",
        "Checkpoint directory .* exists and is not empty",
        "The dirpath has changed from",  # a resumed run writes into a new folder
        "predict returned None",  # losses of documents are written at the end
        ".*router_aux_loss_coef",  # aux_loss=False says so
    ):
        warnings.filterwarnings("ignore", pattern)


@contextmanager
def peers_end_too(trainer: pl.Trainer) -> Iterator[None]:
    """Ends the ranks that this rank has started if this rank fails, so that they do not wait for it."""
    try:
        yield
    except BaseException:
        launcher = trainer.strategy.launcher
        if launcher is not None:
            launcher.kill(signal.SIGTERM)
            # Lightning's watcher of these processes would kill this one, which may not have said yet why it fails.
            getattr(launcher, "procs", []).clear()
        raise


def progress_display() -> Callback:
    """Returns a progress bar in a terminal, and progress lines otherwise."""
    return Bar() if sys.stdout.isatty() else ProgressLines()


class Bar(TQDMProgressBar):
    """Lightning's progress bar without the version number of the log."""

    def get_metrics(self, *args: Any) -> dict[str, Any]:
        """Returns the metrics that are shown beside the bar."""
        return {name: value for name, value in super().get_metrics(*args).items() if name != "v_num"}


class ProgressLines(ProgressBar):
    """Progress as one line every few steps, for output that is not a terminal."""

    def __init__(self) -> None:
        super().__init__()
        self.enabled, self.shown = True, 0

    def disable(self) -> None:
        """Turns the display off; Lightning calls it on all ranks except the first."""
        self.enabled = False

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        """Shows the loss in training."""
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.global_step % every == 0 and trainer.global_step > self.shown:
            self._show(trainer, "train/loss")

    def on_validation_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        """Shows the loss in validation."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._show(trainer, "val/loss")

    def _show(self, trainer: pl.Trainer, name: str) -> None:
        self.shown = trainer.global_step
        if self.enabled and name in trainer.callback_metrics:
            total = trainer.estimated_stepping_batches
            of_all = f"/{total:g}" if 0 < total < math.inf else ""
            print(f"step {self.shown:>4}{of_all}   {name:<10} {trainer.callback_metrics[name]:.3f}", flush=True)

# SPDX-License-Identifier: Apache-2.0
"""LoadBalanceMonitor: logs how evenly tokens are spread over experts and over the ranks that hold them."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from numpy.typing import NDArray
from typing_extensions import override

from lightning_moefold.callbacks.balance_statistics import balance_statistics, layer_statistics, rank_imbalance
from lightning_moefold.callbacks.common import LogSchedule, log_file, log_values
from lightning_moefold.callbacks.expert_load import ExpertLoad, LoadHistory, LoadReader
from lightning_moefold.callbacks.load_images import LoadImages
from lightning_moefold.plots.files import EXPERT_LOAD


class LoadBalanceMonitor(pl.Callback):
    """Logs how often each expert is chosen in training, over the global batch; the same values on every rank.

    Each log step covers the training batches since the previous log step, without padding. Aggregates over layers and
    experts: ``moe/load_imbalance`` and ``moe/load_imbalance_max`` (mean and max over layers of the busiest expert's
    load over the mean; 1 is balanced), ``moe/cv_{mean,median,min,max}`` (coefficient of variation),
    ``moe/dead_expert_frac_mean``, ``moe/entropy_mean`` (over log E), ``moe/expert_diversity_{mean,min}`` (exp of the
    entropy over E), ``moe/expert_utilization_{min,p25,median,p75,max}`` (load over the layer's mean),
    ``moe/dropped_frac`` (share of choices dropped because the expert was full; 0 if dropless).
    ``moe/rank_load_max_over_mean`` compares the rows that ranks compute: how much the busiest rank delays the others.
    With ``per_layer``, it also logs for each MoE layer i of the whole model ``moe/layer_{i}/max_over_mean``, ``/cv``,
    ``/dead_expert_frac`` and ``/entropy``. Layers without any load are left out. ``docs/callbacks.md`` has the
    formulas.

    The layers count on the device; there is one collective at each log step and none per batch. Works under any strategy;
    layers may stand anywhere in the LightningModule, differ in their experts, and be spread over ranks.

    Args:
        log_every_n_steps: Number of optimizer steps between logs; by default the Trainer's. If the Trainer does not log
            at such a step, the values reach its loggers at the next step at which it does.
        per_layer: Whether to log four values per layer. Lightning takes some 0.3 ms of a CPU core to log one value, so
            these are most of the cost of a log step.
        keep_history: Whether to keep the counts of every interval on rank zero (8 bytes per layer and expert) and write
            them to
            ``expert_load.npz`` in the Trainer's ``log_dir`` at the end of training, for ``moefold plot``: ``steps``
            ``[N]``, ``layers`` ``[L]``, ``counts`` ``[N, L, E]``. A second fit that continues the run adds to it.
            Without a logger nothing is written.
        heatmap: Whether to log ``moe/load_heatmap`` (layers x experts) and ``moe/load_histogram`` to a WandbLogger.

    Attributes:
        latest: The latest logged values by name.
    """

    def __init__(
        self,
        log_every_n_steps: int | None = None,
        per_layer: bool = True,
        keep_history: bool = True,
        heatmap: bool = False,
    ) -> None:
        super().__init__()
        self.per_layer, self.keep_history, self.heatmap = per_layer, keep_history, heatmap
        self.latest: dict[str, float] = {}
        self._schedule = LogSchedule(log_every_n_steps)
        self._reader: LoadReader | None = None
        self._history = LoadHistory()
        self._images = LoadImages()

    @property
    def history(self) -> list[tuple[int, NDArray[np.int64]]]:
        """Optimizer step and counts ``[L, E]`` of each interval; on rank zero only."""
        return self._history.entries

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.latest = {}
        self._schedule.start(trainer)
        self._reader = LoadReader(trainer, pl_module)
        self._history.begin([row.layer for row in self._reader.rows], trainer.global_step)
        if not self._reader.rows:
            rank_zero_warn("LoadBalanceMonitor found no MoELayer in the module and has nothing to log.")

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any, **__: Any) -> None:
        assert self._reader is not None
        if not (self._schedule.step_ended(trainer) and self._reader.rows and self._schedule.is_due(trainer)):
            return
        load = self._reader.read()
        self.latest = load_figures(load, self.per_layer)
        log_values(trainer, pl_module, self.latest)
        if trainer.is_global_zero and self.keep_history:
            self._history.entries.append((trainer.global_step, load.counts_LE))
        if trainer.is_global_zero and self.heatmap:
            self._images.log(trainer, load)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.latest and self._reader is not None and self._reader.rows:
            self._schedule.explain_silence(trainer, self)
        self._reader = None
        path = log_file(trainer, EXPERT_LOAD) if self.keep_history else None
        if trainer.is_global_zero and self.history and path is not None:
            self._history.save(path)


def load_figures(load: ExpertLoad, per_layer: bool = True) -> dict[str, float]:
    """Returns the values to log for an interval, by log name."""
    counts = load.by_layer()
    figures = {f"moe/{name}": value for name, value in balance_statistics(counts).items()}
    if figures:
        figures["moe/dropped_frac"] = float(load.dropped_LE.sum() / sum(counts_E.sum() for counts_E in counts))
    if (imbalance := rank_imbalance(load.rank_rows_LR)) is not None:
        figures["moe/rank_load_max_over_mean"] = imbalance
    if per_layer:
        for row, counts_E in zip(load.rows, counts, strict=True):
            figures |= {f"moe/layer_{row.layer}/{name}": value for name, value in layer_statistics(counts_E).items()}
    return figures

# SPDX-License-Identifier: Apache-2.0
"""Pictures of expert loads for Weights & Biases. They are optional: if a package is missing, one warning says so."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from numpy.typing import NDArray

from lightning_moefold.callbacks.common import logged_step
from lightning_moefold.callbacks.expert_load import ExpertLoad
from lightning_moefold.plots.style import draw_heatmap, fair_shares, make_figure


class LoadImages:
    """Logs ``moe/load_heatmap`` (layers x experts) and ``moe/load_histogram`` of the load over the layer's mean.

    Logging needs wandb; the heatmap also needs matplotlib and pillow.
    """

    def __init__(self) -> None:
        self._broken = False

    def log(self, trainer: pl.Trainer, load: ExpertLoad) -> None:
        """Logs the pictures to every WandbLogger. Called on rank zero only; never raises."""
        loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
        share_LE = fair_shares(load.counts_LE)
        if self._broken or not loggers or not np.isfinite(share_LE).any():
            return
        try:
            _log(loggers, share_LE, [row.layer for row in load.rows], logged_step(trainer))
        except Exception as error:
            self._broken = True
            rank_zero_warn(f"LoadBalanceMonitor(heatmap=True) continues without pictures: {error!r}")


def _log(loggers: Iterable[WandbLogger], share_LE: NDArray[np.float64], layers: list[int], step: int) -> None:
    import wandb

    figure, (axes,) = make_figure("Expert load", [max(1.6, 0.25 * len(layers) + 1)], width=8)
    draw_heatmap(axes, share_LE, layers)
    histogram = np.histogram(share_LE[np.isfinite(share_LE)], bins=32)
    for logger in loggers:
        # Through the logger and not by wandb.log(step=...), whose x axis would conflict with Lightning's.
        values: dict[str, Any] = {
            "moe/load_heatmap": wandb.Image(figure),
            "moe/load_histogram": wandb.Histogram(np_histogram=histogram),
        }
        logger.log_metrics(values, step=step)

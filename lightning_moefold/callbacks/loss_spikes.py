# SPDX-License-Identifier: Apache-2.0
"""Notices losses far above the latest ones, and says which rows a batch held."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

#: Keys of a batch under which rows are named.
ROW_NAMES = ("row_ids", "ids", "id", "index", "source_ids")


@dataclass(frozen=True)
class LossSpike:
    """A loss far above the latest ones.

    Args:
        step: Number of the optimizer step, from 1.
        loss: Mean loss of the step over data ranks.
        usual: Median of the latest losses.
        data_rank: Data rank with the largest loss; None if all have the same, because the loss is that of all rows.
        batches: What each batch of the step held (:func:`describe_rows`).
    """

    step: int
    loss: float
    usual: float
    data_rank: int | None
    batches: tuple[str, ...]


class SpikeDetector:
    """Compares each loss with the latest ones.

    A loss is a spike if it is above their median by more than ``width`` times their median absolute deviation (scaled to
    a standard deviation), and by more than 1% of the median, which leaves out the noise of a loss that hardly moves.

    Args:
        width: Number of standard deviations.
        remembered: Number of latest losses.
        needed: Number of losses before the first judgement.
    """

    def __init__(self, width: float, remembered: int = 128, needed: int = 16) -> None:
        self._width, self._needed = width, needed
        self._latest: deque[float] = deque(maxlen=remembered)

    def add(self, loss: float) -> float | None:
        """Returns the usual loss if ``loss`` is a spike, else None. A spike is not counted among the latest losses."""
        if len(self._latest) >= self._needed:
            usual = statistics.median(self._latest)
            deviation = 1.4826 * statistics.median(abs(x - usual) for x in self._latest)
            if loss - usual > max(self._width * deviation, 0.01 * abs(usual)):
                return usual
        self._latest.append(loss)
        return None


def describe_rows(trainer: pl.Trainer, batch: Any, index: int) -> str:
    """Says which rows a batch holds: by names in the batch, by the order of our samplers, else by the batch's number.

    Args:
        trainer: The Trainer, during a fit.
        batch: The batch of this rank.
        index: Its number in the epoch.
    """
    text = f"batch {index} of epoch {trainer.current_epoch}"
    if isinstance(batch, Mapping):
        name = next((name for name in ROW_NAMES if name in batch), None)
        if name is not None:
            return f"{text}, {name} {_few(_plain(batch[name]))}"
    loader = trainer.fit_loop._combined_loader
    for one in [] if loader is None else loader.flattened:
        for order in (getattr(one, "sampler", None), getattr(one, "batch_sampler", None)):
            if order is not None and hasattr(order, "rows_of_batch"):
                return f"{text}, rows {_few(order.rows_of_batch(index))} of all data ranks"
    return text


def _plain(value: Any) -> Sequence[Any]:
    if isinstance(value, Tensor):
        return list(dict.fromkeys(value.flatten().tolist()))
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _few(numbers: Sequence[Any]) -> str:
    return ", ".join(map(str, numbers[:16])) + (", ..." if len(numbers) > 16 else "")

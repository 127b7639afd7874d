# SPDX-License-Identifier: Apache-2.0
"""Divides the loss of accumulated batches by the labels of the whole optimizer step.

Lightning averages the losses of accumulated batches, so a label in a batch with few labels weighs more than one in a
batch with many. If all labels weigh the same, a batch's share of the step is its share of the labels, which requires
the labels of the later batches. So at the first batch of a step the others are read from the loader, counted, and held
until Lightning requests them. The alternative, rescaling gradients at the end, is impossible: the gradients of
auxiliary losses, which are averaged over batches, could no longer be separated from the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher
from torch import Tensor

from lightning_moefold.errors import UnsupportedFeature
from lightning_moefold.lifecycle.data_positions import same_state
from lightning_moefold.models import MoECausalLM
from lightning_moefold.models.batch import label_weight
from lightning_moefold.models.losses import StepLabels
from lightning_moefold.models.masks import shortest_window


class StepAhead:
    """Gives the language models of a module, batch by batch, the label weights of their optimizer step during a fit.

    Raises:
        UnsupportedFeature: If there are no labels that could be counted in advance.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._trainer = trainer
        self._models = [m for m in module.modules() if isinstance(m, MoECausalLM)]
        windows = [shortest_window(model.config) for model in self._models]
        self._window = min((w for w in windows if w is not None), default=None)
        self._weights: deque[Tensor] = deque()
        self._step: StepLabels | None = None
        self._taken = False
        self._held: _Held | None = None
        if not self._models or not module.automatic_optimization:
            what = "accumulates by hand" if self._models else "holds no MoECausalLM, whose labels are counted"
            raise UnsupportedFeature(
                f"calculate_per_token_loss=True divides the loss of accumulated batches by their labels, but "
                f"{type(module).__name__} {what}; leave it out."
            )

    def begin(self, batch: Any) -> None:
        """Registers the next training batch; at the first batch of a step, reads and counts the others."""
        loop, divisor = self._trainer.fit_loop, self._trainer.accumulate_grad_batches
        self._step = None
        if divisor == 1:
            return
        if isinstance(loop._data_fetcher, _DataLoaderIterDataFetcher):
            raise UnsupportedFeature(
                "calculate_per_token_loss=True counts the labels of batches in advance, which is impossible if training_step "
                "takes the dataloader_iter; take the batch instead, or leave the option out."
            )
        place = (loop.epoch_loop.batch_progress.current.ready - 1) % divisor
        if place == 0 or not self._weights:  # also empty if a run resumes in the middle of a step
            weights = [_weight(b, self._window) for b in (batch, *self._look_ahead(divisor - 1 - place))]
            weights = [w.to(weights[0].device) for w in weights]
            self._weights, self._total, self._count = deque(weights), torch.stack(weights).sum(), len(weights)
        self._step = StepLabels(self._weights.popleft(), self._total, self._count, divisor)

    @contextmanager
    def told(self) -> Iterator[None]:
        """The context of ``training_step``, in which the models know the label weights.

        Raises:
            UnsupportedFeature: If no model was called with labels.
        """
        if self._step is None:
            yield
            return
        self._taken = False
        for model in self._models:
            model.step_labels = self._take
        try:
            yield
        finally:
            for model in self._models:
                model.step_labels = None
        if not self._taken:
            raise UnsupportedFeature(
                "calculate_per_token_loss=True divides the loss of MoECausalLM by the labels of the step, but training_step called "
                "none with labels; call it with labels, or leave the option out."
            )

    def _take(self) -> StepLabels:
        assert self._step is not None
        self._taken = True
        return self._step

    def correct(self, checkpoint: dict[str, Any]) -> None:
        """Replaces the data position in a checkpoint by the one before the held batches.

        That of a data module stays if reading does not move it: the module counts what was trained on, and is right.
        """
        if self._held is not None and self._held.positions:
            loaders, data = self._held.positions[0]
            if loaders and "loops" in checkpoint:
                checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] = loaders
            if data and self._held.moves_data:
                checkpoint[self._trainer.datamodule.__class__.__qualname__] = data  # type: ignore[attr-defined]

    def _look_ahead(self, count: int) -> list[Any]:
        """Reads up to ``count`` further batches, which Lightning later receives from here."""
        fetcher = self._trainer.fit_loop._data_fetcher
        assert fetcher is not None
        assert fetcher.iterator is not None
        if not isinstance(fetcher.iterator, _Held):
            fetcher.iterator = _Held(fetcher.iterator, self._position)
        self._held = fetcher.iterator
        fetched = list(getattr(fetcher, "batches", ()))[:count]  # if the length is unknown, Lightning is one ahead
        return [item[0] for item in (*fetched, *self._held.hold(count - len(fetched)))]

    def _position(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Returns the position of the loaders and the data module."""
        loader, data = self._trainer.fit_loop._combined_loader, self._trainer.datamodule  # type: ignore[attr-defined]
        return ([] if loader is None else loader._state_dicts()), ({} if data is None else data.state_dict())


class _Held:
    """An iterator over batches that can read ahead and hold batches; ``position`` returns the position of the data.

    Attributes:
        positions: Position of the data before each held batch.
        moves_data: Whether the position of the data module has moved while batches were read.
    """

    def __init__(self, iterator: Iterator[Any], position: Any) -> None:
        self._iterator, self._position = iterator, position
        self._batches: deque[Any] = deque()
        self.positions: deque[Any] = deque()
        self.moves_data = False
        self._over = False

    def __iter__(self) -> _Held:
        return self

    def __next__(self) -> Any:
        if self._batches:
            self.positions.popleft()
            return self._batches.popleft()
        if self._over:
            raise StopIteration
        return next(self._iterator)

    def hold(self, count: int) -> list[Any]:
        """Returns the next ``count`` batches, or fewer at the end, and holds them for later iteration."""
        while len(self._batches) < count and not self._over:
            position = self._position()
            try:
                self._batches.append(next(self._iterator))
            except StopIteration:
                self._over = True
            else:
                self.positions.append(position)
                self.moves_data |= not same_state(position[1], self._position()[1])
        return list(self._batches)[:count]


def _weight(batch: Any, window: int | None) -> Tensor:
    """Returns the label weight of a batch; NaN if it cannot be counted, which all ranks learn in the model's call."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if isinstance(labels, Tensor) and labels.dim() == 2:
        try:
            return label_weight(batch, window)
        except ValueError:  # the model's call reports it on all ranks
            pass
    return torch.tensor(float("nan"), dtype=torch.float64)

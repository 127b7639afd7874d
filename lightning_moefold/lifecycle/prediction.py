# SPDX-License-Identifier: Apache-2.0
"""Prediction with different numbers of batches on the data ranks, or none on some."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSamplerWrapper
from lightning.pytorch.trainer.connectors import data_connector

from lightning_moefold.models.join import JoinCalls
from lightning_moefold.modules.base import parallel_roots
from lightning_moefold.parallel.network.runner import network_runners


class Predicting(Callback):
    """Lets ranks call models and blocks a different number of times while the Trainer predicts.

    Until :meth:`finish` it comes before all other callbacks. Calls may be unequal from ``on_predict_start`` on. They are equal
    again when other callbacks reach ``on_predict_epoch_end``, where those may call collectives. Lightning skips all hooks on a
    rank without any batch; that rank joins in :meth:`finish`.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._trainer = trainer
        trainer.callbacks.insert(0, self)  # type: ignore[attr-defined]
        # All ranks call a network equally often if its ranks communicate around its blocks.
        networks = [r.network for _, r in network_runners(module) if r.fold.cp * r.fold.pp > 1]
        inside = {id(block) for network in networks for block in network.blocks()}
        self._models = [root for _, root in parallel_roots(module) if id(root) not in inside]
        self._calls: JoinCalls | None = None
        self._over = not self._models
        self._lenient = ExitStack()
        self._lenient.enter_context(_ranks_may_be_empty(module))

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Opens the context in which ranks may be out of step."""
        self._enter()

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Waits for the ranks that have more batches."""
        self._leave(None)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Informs the other ranks of the error."""
        self._leave(exception)

    def finish(self) -> None:
        """Removes this callback; a rank without any batch first takes part in the calls of the others."""
        self._trainer.callbacks.remove(self)  # type: ignore[attr-defined]
        if not self._over:
            self._enter()
        self._leave(None)

    def _enter(self) -> None:
        self._lenient.close()
        if not self._over:
            self._calls = JoinCalls(self._models).__enter__()

    def _leave(self, error: BaseException | None) -> None:
        self._lenient.close()
        calls, self._calls, self._over = self._calls, None, True
        if calls is not None:
            calls.__exit__(None if error is None else type(error), error, None)


class _OwnRows(UnrepeatedDistributedSamplerWrapper):
    """Lightning's sampler for prediction, which may be empty on this rank.

    Lightning's constructor ends with an assertion that this rank has a row, which fails only on ranks without one.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with suppress(AssertionError):
            super().__init__(*args, **kwargs)


@contextmanager
def _ranks_may_be_empty(module: pl.LightningModule) -> Iterator[None]:
    strict, theirs = module.allow_zero_length_dataloader_with_multiple_devices, UnrepeatedDistributedSamplerWrapper
    module.allow_zero_length_dataloader_with_multiple_devices = True
    data_connector.UnrepeatedDistributedSamplerWrapper = _OwnRows  # type: ignore[misc]
    yield
    data_connector.UnrepeatedDistributedSamplerWrapper = theirs  # type: ignore[misc]
    module.allow_zero_length_dataloader_with_multiple_devices = strict

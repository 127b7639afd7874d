# SPDX-License-Identifier: Apache-2.0
"""SaveAdapter: writes the adapter of a run in PEFT's format at the end of training."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.loggers import WandbLogger
from typing_extensions import override

from lightning_moefold.adapters.saving import check_target
from lightning_moefold.checkpoint import stores
from lightning_moefold.errors import InputError
from lightning_moefold.mesh import SINGLE
from lightning_moefold.models import MoECausalLM


class SaveAdapter(pl.Callback):
    """Writes the adapter of the module's first MoECausalLM when training ends, as :meth:`.MoECausalLM.save_adapter` does.

    Args:
        path: The directory; one that holds an adapter is replaced. By default ``adapter`` in the Trainer's
            ``default_root_dir``.
        artifact: Name under which Weights & Biases stores the directory as an artifact of the type ``model``; None to store
            nothing there.

    With ``fast_dev_run`` nothing is written, as with checkpoints.

    Raises:
        InputError: Before training, if the module has no adapter, or there is an ``artifact`` and no WandbLogger.
        CheckpointError: Before training, if the directory is in a store.
        OSError: Before training, if it holds other files than those of an adapter.
    """

    def __init__(self, path: str | Path | None = None, artifact: str | None = None) -> None:
        super().__init__()
        self.path, self.artifact = path, artifact

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model = self._model(pl_module)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        check_target(self._directory(trainer), SINGLE if model.mesh is None else model.mesh.world)
        if self.artifact is not None and not any(isinstance(logger, WandbLogger) for logger in trainer.loggers):
            raise InputError(
                f"artifact={self.artifact!r} of SaveAdapter needs a WandbLogger; add one, or leave it out."
            )

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        path = self._directory(trainer)
        self._model(pl_module).save_adapter(path)
        if self.artifact is None or not trainer.is_global_zero:
            return
        import wandb

        made = wandb.Artifact(self.artifact, type="model")
        made.add_dir(str(path))
        for logger in (logger for logger in trainer.loggers if isinstance(logger, WandbLogger)):
            logger.experiment.log_artifact(made)

    def _directory(self, trainer: pl.Trainer) -> str | Path:
        return stores.join(stores.parse_path(trainer.default_root_dir), "adapter") if self.path is None else self.path

    @staticmethod
    def _model(module: pl.LightningModule) -> MoECausalLM:
        model = next((m for m in module.modules() if isinstance(m, MoECausalLM) and m.adapter is not None), None)
        if model is None:
            raise InputError("SaveAdapter found no model with an adapter in the module; add one, or leave it out.")
        return model

# SPDX-License-Identifier: Apache-2.0
"""The part of the strategy that saves and loads checkpoints: directories by all ranks, or Lightning's files."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_moefold.agreement import agreeing
from lightning_moefold.checkpoint import stores
from lightning_moefold.checkpoint.drafts import remove_directory, sweep
from lightning_moefold.checkpoint.sharded import META, load_meta, save_sharded
from lightning_moefold.errors import CheckpointError, InputTypeError, UnsupportedFeature
from lightning_moefold.lifecycle import fold_choice
from lightning_moefold.lifecycle.accumulation import StepAhead
from lightning_moefold.lifecycle.background import BackgroundSaves, check_background
from lightning_moefold.lifecycle.data_order import DataOrder
from lightning_moefold.lifecycle.data_positions import gather_positions, take_position
from lightning_moefold.lifecycle.ranks import FoldedRanks
from lightning_moefold.lifecycle.training_state import (
    check_saveable,
    check_state,
    describe_training_state,
    load_training_state,
    optimizer_state,
)
from lightning_moefold.mesh import Axis
from lightning_moefold.modules.base import ParallelRoot, parallel_roots
from lightning_moefold.parallel.parameters import ParameterRegistry


class SharedCheckpoints(FoldedRanks):
    """A strategy whose checkpoints are layout-free directories if a model is stored in pieces.

    A module without such a model is saved and loaded as under any strategy.
    """

    #: Whether checkpoints are saved with checksums, which are compared when they are loaded.
    checksums: bool = True
    #: Whether training goes on while checkpoints are written.
    async_save: bool = False
    _background: BackgroundSaves | None = None
    _registry: ParameterRegistry | None = None
    #: Deals the user's samplers.
    _data_order: DataOrder
    #: Counts the labels of the optimizer step, if its loss is divided by them.
    _step_ahead: StepAhead | None = None
    #: Step of the checkpoint from which this fit goes on; None for a fit from the beginning.
    resumed_step: int | None = None

    @override
    def connect(self, model: pl.LightningModule) -> None:
        self._registry = None  # belongs to an earlier entry point, perhaps of another module
        self._data_order = DataOrder(getattr(self, "_data_order", None))
        self.resumed_step = None
        super().connect(model)

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        return self._spreads

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return not self._sharded

    @property
    def _sharded(self) -> bool:
        return self._registry is not None and self._registry.sharded

    @property
    def _spreads(self) -> bool:
        """Whether the module will be stored in pieces; known after ``configure_model``."""
        return bool(self._roots()) or (self._mesh is not None and self._mesh.fold.pp > 1)

    @abstractmethod
    def _convert(self) -> None:
        """Converts the module to the dtype in which it will be stored."""

    def _roots(self) -> list[ParallelRoot]:
        return [] if self.lightning_module is None else [root for _, root in parallel_roots(self.lightning_module)]

    def _check_places(self, trainer: pl.Trainer, world: Axis) -> None:
        """Tries the places of checkpoints before training. Collective.

        Raises:
            CheckpointError: If a place cannot be written, or not all ranks see it.
        """
        root = stores.parse_path(trainer.default_root_dir)
        if isinstance(root, Path) and world.index == 0:
            self._sweep(root)  # where Lightning saves before a job is requeued
        for callback in trainer.checkpoint_callbacks:
            directory = getattr(callback, "dirpath", None)
            saves = getattr(callback, "save_top_k", True) or getattr(callback, "save_last", None)
            if directory is None or not saves:
                continue
            place = stores.parse_path(directory)
            if isinstance(place, str):
                stores.check_store(place, world)
                continue
            with agreeing(world, CheckpointError):
                if world.index == 0:
                    stores.check_folder(place)
                    self._sweep(place)

    def _sweep(self, directory: Path) -> None:
        """Removes what killed runs have left in a directory of checkpoints; in those of all versions, if it is Lightning's own."""
        versions = directory.parent.parent.glob("*/checkpoints") if directory.name == "checkpoints" else ()
        for place in sorted({directory, *versions}):
            if names := sweep(place):
                rank_zero_info(
                    f"removed unfinished saves of {', '.join(names)} in {place}, whose processes have ended."
                )

    def _check_state(self, optimizer: Optimizer) -> None:
        """Checks an optimizer's state after its first step, if checkpoints will be saved. Collective."""
        trainer = self._module.trainer
        if not trainer.checkpoint_callbacks or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        with agreeing(self.mesh.world, CheckpointError):
            check_state(optimizer, self.registry)

    @property
    def registry(self) -> ParameterRegistry:
        """Which parameter is which, and where its pieces are.

        Raises:
            RuntimeError: Before the strategy is set up.
        """
        if self._registry is None:
            raise RuntimeError("parameters have their places once the strategy is set up; ask in a hook of the fit.")
        return self._registry

    def _release_gathered_weights(self) -> None:
        for root in self._roots():
            root.release_gathered_weights()

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        self._release_gathered_weights()
        return super().lightning_module_state_dict()

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        if not self._sharded:
            return super().optimizer_state(optimizer)
        return optimizer_state(optimizer, self.registry)

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        if self._registry is None and self._spreads:
            reason = f"{filepath} is not saved, because the set-up of the strategy has not finished"
            if sys.exc_info()[1] is None:
                raise CheckpointError(
                    f"{reason}; save after trainer.fit has started, or export the model with save_pretrained."
                )
            rank_zero_warn(f"{reason}.")  # a callback that saves on exceptions must not hide the exception
            return
        if self._step_ahead is not None:
            self._step_ahead.correct(checkpoint)
        if self._mesh is not None:
            self._data_order.save(checkpoint, self._module.trainer, self._mesh.fold.dp)
        if not self._sharded:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        if storage_options is not None:
            raise InputTypeError(
                "MoEFoldStrategy writes checkpoints itself and takes no storage_options; leave them out."
            )
        if self._choice is not None:
            checkpoint[fold_choice.RECORD] = self._choice
        gather_positions(checkpoint, self._module.trainer, self.mesh)
        path = self.broadcast(filepath)
        self.finish_saves()
        packed, tensors = describe_training_state(path, checkpoint, self.registry, summed=self.checksums)
        at_once = Path(path).name.startswith("hpc_ckpt")  # one of Lightning's before a requeue
        if self._background is not None and self._module.trainer.training and not at_once:
            self._background.start(packed, tensors)
        else:
            save_sharded(packed, tensors, self.mesh.world)

    def finish_saves(self) -> None:
        """Waits until the checkpoint that is saved in the background is complete, if there is one.

        Raises:
            CheckpointError: If it could not be saved; on ranks where nothing has failed, PeerError.
        """
        if self._background is not None:
            self._background.finish()

    def _prepare_saves(self, trainer: pl.Trainer) -> None:
        """Checks what will be saved, and makes ready for saves in the background if they are asked for. Collective."""
        if self._sharded:
            with agreeing(self.mesh.world):  # on errors of the user's state_dict(), too
                check_saveable(trainer, self._module)
        if self.async_save:
            check_background(trainer, self._sharded)
            self._background = BackgroundSaves(self.mesh.saves)

    def _end_saves(self) -> None:
        """Finishes the save that is under way; its error does not hide one for which training ends."""
        background, self._background = self._background, None
        if background is None:
            return
        try:
            background.finish()
        except Exception as error:
            if self.lightning_module is None or not self.lightning_module.trainer.interrupted:
                raise
            rank_zero_warn(f"the last checkpoint is not saved: {error}")

    @override
    def remove_checkpoint(self, filepath: str | Path) -> None:
        if not self.is_global_zero:
            return
        place = stores.parse_path(filepath)
        remove: Callable[[], None] = partial(self.checkpoint_io.remove_checkpoint, filepath)
        if isinstance(place, Path) and place.is_dir() and not place.is_symlink():
            remove = partial(remove_directory, place)
        if self._background is None:
            remove()
        else:
            self._background.remove(remove)

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        self.finish_saves()
        given = self.broadcast(checkpoint_path)
        path = given if str(given).startswith("http") else stores.parse_path(given)  # Lightning itself reads http
        if not self._sharded:
            if not str(path).startswith("http") and stores.is_file(stores.join(path, META)):
                raise UnsupportedFeature(f"{path} was saved by a model with MoE layers; this module has none.")
            checkpoint = super().load_checkpoint(path, weights_only)
            self._load_order(checkpoint, path)
            self._say_resumed(path, checkpoint)
            return checkpoint
        if stores.is_file(path):
            raise UnsupportedFeature(
                f"{path} is a single file, not a checkpoint of this strategy; export the model to Hugging "
                "Face format and start from that."
            )
        with agreeing(self.mesh.world, CheckpointError):
            meta = load_meta(path)
        if self._choice is not None and (remark := fold_choice.difference(meta, self._choice)):
            fold_choice.announce(remark)
        self._release_gathered_weights()
        if self._fitting:
            take_position(meta, path, self._module.trainer, self.mesh)
        self._load_order(meta, path)
        optimizers = self.optimizers if self._fitting else []
        load_training_state(path, meta, self.registry, self._module, optimizers, check=self.checksums)
        self._say_resumed(path, meta)
        return meta

    def _load_order(self, checkpoint: Mapping[str, Any], path: Any) -> None:
        if self._fitting:
            self._data_order.load(checkpoint, path, self._module.trainer)

    def _say_resumed(self, path: str | Path, checkpoint: Mapping[str, Any]) -> None:
        """Says after which step, and under which fold, a fit goes on."""
        if not self._fitting:
            return
        self.resumed_step = checkpoint.get("global_step")
        before, now = checkpoint.get("fold"), "" if self._mesh is None else str(self._mesh.fold)
        folds = f", fold {before} to {now}" if before not in (None, now) else f", fold {now}" if now else ""
        fold_choice.announce(f"resuming after step {self.resumed_step}{folds}: {path}")

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        if not self._sharded:
            self._convert()  # before loading, or a stored float64 would be rounded
            super().load_model_state_dict(checkpoint, strict)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        if not self._sharded:
            super().load_optimizer_state_dict(checkpoint)

# SPDX-License-Identifier: Apache-2.0
"""The half of the strategy that saves and loads: directories that all ranks write, or Lightning's files without a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies.parallel import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_moefold import autofold, comm
from lightning_moefold.accumulation import StepAhead
from lightning_moefold.checkpoint import CheckpointError
from lightning_moefold.checkpoint.sharded import load_meta
from lightning_moefold.modules.base import ParallelRoot, parallel_roots
from lightning_moefold.parallel.registry import ParameterRegistry
from lightning_moefold.refusals import UnsupportedFeature
from lightning_moefold.training_state import load_training_state, optimizer_state, save_training_state


class SharedCheckpoints(ParallelStrategy):
    """A strategy whose checkpoints are layout-free directories where models are stored in pieces.

    A module without such a model is saved and loaded as under any strategy.
    """

    _registry: ParameterRegistry | None = None
    #: What ``fold="auto"`` has chosen, as it is stored.
    _choice: dict[str, Any] | None = None
    #: Knows the batches of the optimizer step, where its loss is divided by their labels.
    _step_ahead: StepAhead | None = None

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        return True

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return not self._sharded

    @property
    def _sharded(self) -> bool:
        return self._registry is not None and self._registry.sharded

    def _roots(self) -> list[ParallelRoot]:
        return [] if self.lightning_module is None else [root for _, root in parallel_roots(self.lightning_module)]

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
        assert self._registry is not None
        return optimizer_state(optimizer, self._registry)

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        if self._registry is None:  # a callback that saves on exceptions, refused by setup() for just that
            rank_zero_warn(f"{filepath} is not saved, because the set-up of the strategy has not finished.")
            return
        if self._step_ahead is not None:
            self._step_ahead.correct(checkpoint)
        if not self._sharded:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        if storage_options is not None:
            raise TypeError("MoEFoldStrategy writes checkpoints itself and takes no storage_options; leave them out.")
        assert self._registry is not None
        if self._choice is not None:
            checkpoint[autofold.RECORD] = self._choice
        save_training_state(self.broadcast(filepath), checkpoint, self._registry)

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(self.broadcast(checkpoint_path))
        if not self._sharded:
            if path.is_dir():
                raise UnsupportedFeature(f"{path} was saved by a model with MoE layers; this module has none.")
            return super().load_checkpoint(path, weights_only)
        if path.is_file():
            raise UnsupportedFeature(
                f"{path} is a single file, not a checkpoint of this strategy; export the model to Hugging "
                "Face format and start from that."
            )
        assert self._registry is not None
        assert self.lightning_module is not None
        error: Exception | None = None
        meta: dict[str, Any] = {}
        try:
            meta = load_meta(path)
        except CheckpointError as failure:
            error = failure
        comm.agree_on_error(error, self._registry.mesh.world)
        if self._choice is not None and (remark := autofold.difference(meta, self._choice)):
            autofold.say(remark)
        self._release_gathered_weights()
        fitting = self.lightning_module.trainer.state.fn == TrainerFn.FITTING
        load_training_state(path, meta, self._registry, self.lightning_module, self.optimizers if fitting else [])
        return meta

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        if not self._sharded:
            super().load_model_state_dict(checkpoint, strict)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        if not self._sharded:
            super().load_optimizer_state_dict(checkpoint)

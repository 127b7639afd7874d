# SPDX-License-Identifier: Apache-2.0
"""Jobs for the ranks of the pool: the shipped module and data under a Trainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_moefold import MoEFoldStrategy
from lightning_moefold.recipes import FineTuneModule, TextData
from lightning_moefold.testing.pieces import Piece, owned_pieces
from tests.strategy.plain_modules import trainer


@dataclass
class Report:
    """What a rank has seen: for each epoch the rows it was given, and the losses."""

    rows: dict[int, list[list[int]]] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    dp_rank: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    weights: dict[str, Piece] = field(default_factory=dict)


class Recorded(FineTuneModule):
    """Says what it was given. Rows without a token that counts are left out."""

    early = False

    def on_fit_start(self) -> None:
        self.report = Report(dp_rank=self.trainer.strategy.dp_rank)

    def configure_optimizers(self) -> Any:
        if self.early:  # has Lightning make the loaders before the checkpoint is read
            assert self.trainer.estimated_stepping_batches
        return super().configure_optimizers()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        real = (batch["labels"] != -100).any(1)
        rows = [row.tolist() for row in batch["input_ids"][real]]
        self.report.rows.setdefault(self.trainer.current_epoch, []).extend(rows)
        self.report.losses.append(loss.item())
        return loss

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self.report.validation.append(self.trainer.callback_metrics["val/loss"].item())

    def on_train_epoch_end(self) -> None:
        self.report.steps.append(self.trainer.global_step)


def fit(
    folder: str,
    fold: str,
    module: dict[str, Any],
    data: dict[str, Any],
    arguments: dict[str, Any],
    save: str | None = None,
    ckpt_path: str | None = None,
    early: bool = False,
    microbatches: int = 1,
) -> Report:
    """Fits on ``b.jsonl``, validates on ``c.jsonl``."""
    callbacks = [ModelCheckpoint(save, filename="{step}", save_top_k=-1, every_n_train_steps=1)] if save else []
    text = _data(folder, **data)
    tuned = Recorded(f"{folder}/checkpoint", learning_rate=1e-2, warmup_steps=2, **module)
    tuned.early = early
    strategy = MoEFoldStrategy(fold=fold, num_microbatches=microbatches)
    options = {"precision": "64-true", "num_sanity_val_steps": 0, "enable_checkpointing": bool(save), **arguments}
    run = trainer(strategy, callbacks=callbacks, **options)
    run.fit(tuned, text, ckpt_path=ckpt_path)
    tuned.report.metrics = {name: value.item() for name, value in run.callback_metrics.items()}
    tuned.report.weights = owned_pieces(tuned.model)
    return tuned.report


def measure(folder: str, fold: str, packing: str, output: str, limit: int | None) -> dict[str, float]:
    """Validates, tests and predicts on ``c.jsonl``."""
    module = FineTuneModule(f"{folder}/checkpoint", predictions=output)
    data = _data(folder, packing=packing)
    run = trainer(MoEFoldStrategy(fold=fold), precision="64-true", limit_val_batches=limit)
    seen = {**run.validate(module, data, verbose=False)[0], **run.test(module, data, verbose=False)[0]}
    run.predict(module, data, return_predictions=False)
    return seen


def _data(folder: str, **changes: Any) -> TextData:
    defaults = {"sequence_length": 64, "batch_size": 4, "val_files": [f"{folder}/c.jsonl"], "seed": 3}
    return TextData(
        [f"{folder}/b.jsonl"], f"{folder}/checkpoint", **{**defaults, "cache_dir": f"{folder}/tokens", **changes}
    )


def errors(folder: str, cases: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[str]:
    """What each wrong argument of module or data leads to."""
    messages = []
    for module, data in cases:
        try:
            fit(folder, "| ep2", module, data, {"max_steps": 1})
        except Exception as error:
            messages.append(f"{type(error).__name__}: {error}")
            if dist.is_initialized():
                dist.barrier()
    return messages

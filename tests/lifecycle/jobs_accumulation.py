# SPDX-License-Identifier: Apache-2.0
"""Jobs that accumulate batches by their labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_moefold.checkpoint.sharded import load_meta
from tests.strategy import finetune
from tests.strategy.jobs_bad_input import told


class Data(pl.LightningDataModule):
    """Says where it stands, as its loader does."""

    def train_dataloader(self) -> finetune.Steps:
        strategy = self.trainer.strategy
        self.steps = finetune.Steps(finetune.rows(5 * finetune.ROWS), strategy.dp_rank, strategy.dp_size)
        return self.steps

    def state_dict(self) -> dict[str, int]:
        return {"at": self.steps.done}


class CountsTrained(Data):
    """Says what was trained on, whatever was read."""

    def state_dict(self) -> dict[str, int]:
        return {"at": self.trainer.fit_loop.epoch_loop.batch_progress.total.processed}


class Saves(Callback):
    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        batch_idx = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        trainer.save_checkpoint(f"{self.folder}/{batch_idx}.ckpt")


def places(path: str, folder: str, data: str) -> list[tuple[dict[str, int], dict[str, int]]]:
    """Where loader and data module stood in a checkpoint after each of five batches, three to a step."""
    options: dict[str, Any] = {"accumulate_grad_batches": 3, "max_epochs": 1, "limit_val_batches": 0}
    run = finetune.make("| ep2", {**options, "callbacks": [Saves(folder)]}, calculate_per_token_loss=True)
    run.fit(finetune.Finetune(path), datamodule={"Data": Data, "CountsTrained": CountsTrained}[data]())
    metas = [load_meta(Path(folder) / f"{number}.ckpt") for number in range(1, 6)]
    return [(m["loops"]["fit_loop"]["state_dict"]["combined_loader"][0], m[data]) for m in metas]


class Odd(finetune.Finetune):
    """Does something that cannot be counted ahead."""

    def __init__(self, path: str, what: str) -> None:
        super().__init__(path)
        self.what = what
        self.automatic_optimization = what != "by hand"

    def train_dataloader(self) -> Any:
        tokens = finetune.rows(2)
        batch = [tokens, tokens] if self.what == "no mapping" else {"input_ids": tokens, "labels": tokens}
        return DataLoader([batch] * 4, batch_size=None)

    def training_step(self, batch: Any, _: int) -> Tensor:
        if self.what == "no mapping":
            batch = {"input_ids": batch[0], "labels": batch[1]}
        if self.what == "other labels":
            batch = {**batch, "labels": batch["labels"].masked_fill(batch["labels"] < 48, -100)}
        if self.what == "no labels":
            return self.model(batch["input_ids"], gather_logits=True).logits.square().mean()
        if self.what == "loss_fn":
            return self.model(**batch, loss_fn=_mean).loss
        if self.what == "two calls":
            with torch.no_grad():
                self.model(batch["input_ids"])
            return self.model(**batch).loss + 0.5 * self.model(**batch).loss
        return self.model(**batch).loss


def _mean(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return logits.square().sum(), torch.tensor(float(logits.numel()))


class OneArgument(Odd):
    def training_step(self, dataloader_iter: Any) -> Tensor:
        batch, _, _ = next(dataloader_iter)
        return self.model(**batch).loss


def refusals(path: str, fold: str, names: list[str]) -> dict[str, str]:
    said = {}
    for name in names:
        module: Any = {"plain": lambda: BoringModel(), "iterator": lambda: OneArgument(path, "iterator")}.get(
            name, lambda n=name: Odd(path, n)
        )()
        options = {"max_steps": 1, "accumulate_grad_batches": 1 if name == "by hand" else 2, "limit_val_batches": 0}
        run = finetune.make(fold, options, calculate_per_token_loss=True)
        said[name] = told(lambda r=run, m=module: r.fit(m))
    return said

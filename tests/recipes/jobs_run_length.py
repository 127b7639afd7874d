# SPDX-License-Identifier: Apache-2.0
"""Jobs for the ranks of the pool: learning rates of runs whose number of steps is known, or not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_moefold import MoEFoldStrategy
from lightning_moefold.recipes import FineTuneModule, StreamData
from tests.strategy.plain_modules import trainer

TOKENS = torch.randint(96, (24, 6), generator=torch.Generator().manual_seed(1))
ROWS = [{"input_ids": token_S, "labels": token_S} for token_S in TOKENS]


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        yield from ROWS


class Rates(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.seen.append(optimizer.param_groups[0]["lr"])


def rates(
    path: str, fold: str, cases: list[tuple[dict[str, Any], dict[str, Any], bool | int]]
) -> list[tuple[list[float], str]]:
    """For options of module and Trainer, and whether a stream (or on how many rows of rank 0) is trained on.

    Returns:
        Of each case the learning rates of the steps, and the error.
    """
    found = []
    for module, options, stream in cases:
        recorder, message = Rates(), ""
        callbacks: list[Callback] = [recorder]
        if (factors := options.get("accumulate")) is not None:
            callbacks.append(GradientAccumulationScheduler(factors))
        arguments = {name: value for name, value in options.items() if name != "accumulate"}
        run = trainer(MoEFoldStrategy(fold=fold), callbacks=callbacks, use_distributed_sampler=False, **arguments)
        rows = ROWS[: int(stream)] if stream > 1 and dist.get_rank() == 0 else ROWS
        loader = DataLoader(Stream() if stream is True else rows, batch_size=4)
        try:
            run.fit(FineTuneModule(path, warmup_steps=1, learning_rate=1.0, **module), loader)
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
        found.append((recorder.seen, message))
    return found


class _Rows(FineTuneModule):
    """Notes the rows that count in each batch."""

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.rows: list[list[list[int]]] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        real = (batch["labels"] != -100).any(1)
        self.rows.append(batch["input_ids"][real].tolist())
        return super().training_step(batch, batch_idx)


def streamed(
    path: str, tokenizer: str, file: str, fold: str, steps: int, save: str | None = None, resume: str | None = None
) -> list[list[list[int]]]:
    """Trains on a stream; returns the rows of each batch of this rank."""
    data = StreamData(tokenizer, [file], 20, sequence_length=64, batch_size=4, seed=3)
    callbacks = [ModelCheckpoint(save, filename="{step}", save_top_k=-1, every_n_train_steps=1)] if save else []
    module = _Rows(path, schedule="constant")
    run = trainer(
        MoEFoldStrategy(fold=fold), callbacks=callbacks, enable_checkpointing=bool(save), max_steps=steps, max_epochs=-1
    )
    run.fit(module, data, ckpt_path=resume)
    return module.rows

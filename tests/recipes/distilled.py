# SPDX-License-Identifier: Apache-2.0
"""Job for the ranks of the pool: a student learns what was stored of a teacher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_moefold import MoEFoldStrategy, ResumableSampler
from lightning_moefold.recipes import FineTuneModule, distillation_loss
from tests.strategy.plain_modules import trainer


class Student(FineTuneModule):
    def __init__(self, path: str, rows: list[dict[str, Tensor]], batch_size: int = 4) -> None:
        super().__init__(path, schedule="constant", learning_rate=1e-2, warmup_steps=0, calculate_per_token_loss=False)
        self.rows, self.size, self.losses, self.seen = rows, batch_size, [], []

    def train_dataloader(self) -> Any:
        rows: Any = self.rows
        return DataLoader(rows, self.size // self.trainer.strategy.dp_size, sampler=ResumableSampler(rows, seed=4))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        output = self.model(**batch, loss_fn=distillation_loss(0.7, 2.0))
        self.losses.append(output.loss.item())
        self.seen += batch["input_ids"][(batch["labels"] >= 0).any(1)][:, 0].tolist()
        return output.loss


def fit(
    path: str, rows: list[dict[str, Tensor]], fold: str, microbatches: int, epochs: int = 1
) -> tuple[list[float], list[int]]:
    """Losses of the batches, and the first token of each row that counted here."""
    student = Student(path, rows)
    run = trainer(
        MoEFoldStrategy(fold=fold, num_microbatches=microbatches), precision="64-true", max_epochs=epochs, max_steps=-1,
    )  # fmt: skip
    run.fit(student)
    assert isinstance(student.model, nn.Module)
    return student.losses, student.seen


def make_rows(count: int, vocabulary: int, length: int, stored: int) -> list[dict[str, Tensor]]:
    """Random rows, each with a first token of its own, and a random teacher."""
    draw = torch.Generator().manual_seed(0)
    rows = []
    for number in range(count):
        ids = torch.randint(vocabulary, (length,), generator=draw)
        ids[0] = number
        top = torch.log_softmax(2 * torch.randn(length, vocabulary, generator=draw), -1).topk(stored)
        rows.append({"input_ids": ids, "labels": ids, "teacher_logprobs": top.values, "teacher_ids": top.indices.int()})
    return rows

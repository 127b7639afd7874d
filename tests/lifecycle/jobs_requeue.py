# SPDX-License-Identifier: Apache-2.0
"""A rank of a job that SLURM requeues; its arguments: a model, a folder."""

from __future__ import annotations

import os
import sys
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_moefold import MoEFoldStrategy, ResumableSampler
from lightning_moefold.cli.terminal import quiet
from tests.lifecycle.jobs_signals import Endless


class Counting(Endless):
    """Prints the rows of each batch."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        print("step", self.global_step, *batch.pop("row").tolist(), flush=True)
        return self.model(**batch).loss


if __name__ == "__main__":
    quiet()
    ids = torch.arange(8)
    rows: Any = [{"input_ids": ids, "labels": ids, "row": n} for n in range(100_000)]
    trainer = pl.Trainer(
        strategy=MoEFoldStrategy(fold=["tp2 | ep2", ""]), accelerator="cpu", devices=int(os.environ["SLURM_NTASKS"]),
        max_epochs=-1, logger=False, default_root_dir=sys.argv[2], enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Counting(), DataLoader(rows, batch_size=2, sampler=ResumableSampler(rows, shuffle=False)))

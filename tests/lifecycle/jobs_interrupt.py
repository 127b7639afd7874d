# SPDX-License-Identifier: Apache-2.0
"""A script of two ranks that train until stopped; its arguments: a model, a folder for checkpoints, perhaps one of them."""

from __future__ import annotations

import sys
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_moefold import MoEFoldStrategy
from lightning_moefold.callbacks import SaveOnInterrupt
from lightning_moefold.cli.terminal import quiet
from tests.lifecycle.jobs_signals import Endless


class Accumulating(Endless):
    seen = 0

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.seen += 1
        if self.seen == 4:  # of this run, which may have been resumed
            print("at work", flush=True)
        return super().training_step(batch, -1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        print(f"saved with {self.trainer.fit_loop.epoch_loop.batch_progress.current.ready} batches", flush=True)


if __name__ == "__main__":
    quiet()
    ids = torch.arange(8)
    trainer = pl.Trainer(
        strategy=MoEFoldStrategy(fold="tp2 | ep2"), accelerator="cpu", devices=2, max_epochs=-1, accumulate_grad_batches=3,
        max_time={"minutes": 5},  # whatever becomes of the test
        logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[SaveOnInterrupt(), ModelCheckpoint(sys.argv[2], every_n_train_steps=100_000)],
    )  # fmt: skip
    resumed = sys.argv[3] if len(sys.argv) > 3 else None
    rows = [{"input_ids": ids, "labels": ids}] * 100_000
    trainer.fit(Accumulating(), torch.utils.data.DataLoader(rows), ckpt_path=resumed)

# SPDX-License-Identifier: Apache-2.0
"""A script of two ranks that train until stopped; its arguments: a model, a folder for checkpoints, perhaps one of them."""

from __future__ import annotations

import sys

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_moefold import MoEFoldStrategy
from lightning_moefold.callbacks import SaveOnInterrupt
from lightning_moefold.cli.terminal import quiet
from tests.lifecycle.jobs_signals import Endless

if __name__ == "__main__":
    quiet()
    ids = torch.arange(8)
    trainer = pl.Trainer(
        strategy=MoEFoldStrategy(fold="tp2 | ep2"), accelerator="cpu", devices=2, max_epochs=-1, logger=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[SaveOnInterrupt(), ModelCheckpoint(sys.argv[2], every_n_train_steps=100_000)],
    )  # fmt: skip
    resumed = sys.argv[3] if len(sys.argv) > 3 else None
    trainer.fit(
        Endless(), torch.utils.data.DataLoader([{"input_ids": ids, "labels": ids}] * 100_000), ckpt_path=resumed
    )

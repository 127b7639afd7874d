# SPDX-License-Identifier: Apache-2.0
"""A job whose pipeline is recorded."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lightning_moefold import MoECausalLM, MoEFoldStrategy
from lightning_moefold.callbacks import PipelineTimeline
from lightning_moefold.testing import PoolEnvironment


class Module(pl.LightningModule):
    def __init__(self, checkpoint: str) -> None:
        super().__init__()
        self.checkpoint = checkpoint

    def configure_model(self) -> None:
        self.model = MoECausalLM.from_pretrained(self.checkpoint)

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(checkpoint: str, folder: str, schedule: str) -> None:
    """Three steps, of which the second is recorded."""
    ids = torch.arange(8)
    trainer = pl.Trainer(
        strategy=MoEFoldStrategy(fold="pp2", num_microbatches=3, pipeline_schedule=schedule), accelerator="cpu", devices=2,
        max_steps=3, logger=CSVLogger(folder), enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, plugins=[PoolEnvironment()], callbacks=[PipelineTimeline(step=2)],
    )  # fmt: skip
    trainer.fit(Module(checkpoint), torch.utils.data.DataLoader([{"input_ids": ids, "labels": ids}] * 9, batch_size=3))

# SPDX-License-Identifier: Apache-2.0
"""A script of two ranks that train until somebody stops them. Its argument is a checkpoint."""

from __future__ import annotations

import sys
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_moefold import MoECausalLM, MoEFoldStrategy
from lightning_moefold.cli.terminal import quiet


class Endless(pl.LightningModule):
    def configure_model(self) -> None:
        self.model = MoECausalLM.from_pretrained(sys.argv[1])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if batch_idx == 3:
            print("at work", flush=True)
        return self.model(**batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


if __name__ == "__main__":
    quiet()
    ids = torch.arange(8)
    trainer = pl.Trainer(
        strategy=MoEFoldStrategy(fold="tp2 | ep2"), accelerator="cpu", devices=2, max_epochs=-1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Endless(), torch.utils.data.DataLoader([{"input_ids": ids, "labels": ids}] * 1000))

# SPDX-License-Identifier: Apache-2.0
"""A script of two ranks, of which the second is killed in its third training step. Its argument is a checkpoint."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_moefold import MoECausalLM, MoEFoldStrategy
from lightning_moefold.recipes.terminal import quiet


class Killed(pl.LightningModule):
    def configure_model(self) -> None:
        self.model = MoECausalLM.from_pretrained(sys.argv[1])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self.global_rank == 1 and batch_idx == 2:
            os.kill(os.getpid(), signal.SIGKILL)  # as the system does when memory is short
        return self.model(**batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


if __name__ == "__main__":
    quiet()
    ids = torch.arange(8)
    trainer = pl.Trainer(
        strategy=MoEFoldStrategy(fold="tp2 | ep2"), accelerator="cpu", devices=2, max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Killed(), torch.utils.data.DataLoader([{"input_ids": ids, "labels": ids}] * 8))

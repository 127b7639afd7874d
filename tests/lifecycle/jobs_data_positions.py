# SPDX-License-Identifier: Apache-2.0
"""A loader that keeps its place on each data rank, as streaming datasets do, in fits that stop and go on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from tests.strategy import finetune
from tests.strategy.finetune import Finetune, make


class Stream:
    """Rows of this data rank's own shard. A rank skips ``rank`` rows after each that it gives, so that places differ."""

    def __init__(self, rank: int) -> None:
        self.rank, self.next = rank, 0

    def __len__(self) -> int:
        """Known: of a loader without a length Lightning fetches a batch ahead, and its state has passed it."""
        return 32

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        rows = finetune.rows(64, seed=self.rank)
        while True:
            row = self.next
            self.next += 1 + self.rank
            yield {"input_ids": rows[row : row + 1], "labels": rows[row : row + 1], "row": torch.tensor([row])}

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


class Streaming(Finetune):
    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.seen: list[int] = []

    def train_dataloader(self) -> Any:
        return Stream(self.trainer.strategy.dp_rank)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        self.seen.append(int(batch.pop("row")))
        return super().training_step(batch, index)


def stream(path: str, fold: str, folder: str, steps: int, ckpt_path: str | None) -> tuple[int, list[int], str]:
    """Data rank, the rows that it read, and the error if there is one."""
    module = Streaming(path)
    saver = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=2)
    run = make(fold, {"callbacks": [saver], "enable_checkpointing": True, "max_steps": steps, "limit_val_batches": 0})
    try:
        run.fit(module, ckpt_path=ckpt_path)
    except ValueError as error:
        return run.strategy.dp_rank, module.seen, str(error)
    return run.strategy.dp_rank, module.seen, ""

# SPDX-License-Identifier: Apache-2.0
"""Jobs in which the data of ranks ends at different times."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_moefold import Fold, MoEFoldStrategy
from tests.strategy import finetune
from tests.strategy.jobs_bad_input import told
from tests.strategy.plain_modules import trainer


class Rows(Dataset):
    """So many batches of two rows, the number known."""

    def __init__(self, count: int, features: int | None = None) -> None:
        self.count, self.features = count, features

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        if index >= self.count:
            raise IndexError
        if self.features is not None:
            return torch.ones(2, self.features)
        tokens = finetune.rows(2, seed=index)
        return {"input_ids": tokens, "labels": tokens}


class Stream(IterableDataset):
    """The number is not known."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return (self.rows[i] for i in range(self.rows.count))


class Promising(Stream):
    """A number is promised that does not hold."""

    def __len__(self) -> int:
        return 5


KINDS = {"rows": lambda rows: rows, "stream": Stream, "promising": Promising}


class Module(finetune.Finetune):
    def train_dataloader(self) -> DataLoader:
        return self.loaders["train"]

    def val_dataloader(self) -> DataLoader:
        return self.loaders["val"]

    test_dataloader = val_dataloader


class Plain(BoringModel):
    train_dataloader, val_dataloader, test_dataloader = (
        Module.train_dataloader,
        Module.val_dataloader,
        Module.val_dataloader,
    )


def run(path: str, fold: str, cases: dict[str, dict[str, Any]]) -> dict[str, tuple[str, int, float]]:
    """What each case said, the optimizer steps it made, and the seconds it took."""
    dp = Fold.parse(fold, dist.get_world_size()).coordinates(dist.get_rank())["dp"]
    said = {}
    for name, case in cases.items():
        plain = case.get("plain", False)
        module: Any = Plain() if plain else Module(path)
        features = 32 if plain else None
        module.loaders = {
            part: DataLoader(
                KINDS[case.get("kind", "stream")](Rows(case.get(part, [3, 3])[dp], features)), batch_size=None
            )
            for part in ("train", "val")
        }
        microbatches = case.get("microbatches")
        if isinstance(microbatches, list):
            microbatches = microbatches[dist.get_rank()]
        strategy = MoEFoldStrategy(fold=fold, num_microbatches=microbatches)
        options = {
            "max_epochs": 2,
            "num_sanity_val_steps": 0,
            "use_distributed_sampler": False,
            **case.get("trainer", {}),
        }
        fresh = trainer(strategy, **options)
        begin = time.monotonic()
        entry = getattr(fresh, case.get("entry", "fit"))
        text = told(lambda f=entry, m=module: f(m))
        said[name] = text, fresh.global_step, time.monotonic() - begin
    return said

# SPDX-License-Identifier: Apache-2.0
"""Jobs whose hyperparameters or states could not be read back from a checkpoint."""

from __future__ import annotations

import dataclasses
import enum
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from tests.strategy.finetune import Finetune, make
from tests.strategy.jobs_bad_input import told


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Options:
    rate: float = 0.1


class Remembering(Callback):
    """Has something in its state; made on rank zero only, if so wished."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}


class Scheduled(Finetune):
    """A schedule whose state holds a class, and groups with one."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        if self.spec["where"] == "group":
            optimizer.param_groups[0]["colour"] = Colour.RED
            return optimizer
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _Warmup())
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class _Warmup:
    def __init__(self) -> None:
        self.options = Options()

    def __call__(self, step: int) -> float:
        return min(1.0, self.options.rate * (step + 1))


class Data(pl.LightningDataModule):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.save_hyperparameters()


#: Module, callbacks and data, and what the sentence names.
CASES: dict[str, tuple[Callable[[str], Finetune], list[Any], Any, str]] = {
    "enum": (lambda p: Finetune(p, colour=Colour.RED), [], None, "the hyperparameter 'colour' of Finetune holds a"),
    "numpy": (lambda p: Finetune(p, rate=np.float32(0.1)), [], None, "the hyperparameter 'rate' of Finetune holds a numpy"),
    "dataclass": (lambda p: Finetune(p, nested=[{"a": Options()}]), [], None, "the hyperparameter 'nested' of Finetune holds a"),
    "lock": (lambda p: Finetune(p), [Remembering(threading.Lock())], None, "the state of Remembering cannot be saved"),
    "callback": (lambda p: Finetune(p), [Remembering(Colour.RED)], None, "the state of Remembering holds a"),
    "data": (lambda p: Finetune(p), [], lambda: Data(colour=Colour.RED), "the hyperparameter 'colour' of Data holds a"),
    "schedule": (lambda p: Scheduled(p, where="schedule"), [], None, "the state of LambdaLR holds a"),
    "group": (lambda p: Scheduled(p, where="group"), [], None, "a parameter group of AdamW holds a"),
}  # fmt: skip


def refused(path: str, fold: str, folder: str) -> dict[str, tuple[str, int]]:
    """What each is told, and the steps that were done before."""
    outcome = {}
    for name, (make_module, callbacks, data, _) in CASES.items():
        module = make_module(path)
        saving = {"callbacks": [ModelCheckpoint(folder), *callbacks], "enable_checkpointing": True}
        run = make(fold, {"max_steps": 1, **saving})
        given = None if data is None else data()
        outcome[name] = told(lambda r=run, m=module, d=given: r.fit(m, datamodule=d)), len(module.report.losses)
    return outcome


def fine(path: str, folder: str) -> list[str]:
    """Plain data is saved, with a path in it; and what is not plain trains where nothing is saved."""
    saving = {"callbacks": [ModelCheckpoint(folder), Remembering([1, "a", None])], "enable_checkpointing": True}
    return [
        told(
            lambda: make("", {"max_steps": 1, **saving}).fit(Finetune(path, where=Path("a"), sizes=(1, 2.5), name=None))
        ),
        told(lambda: make("", {"max_steps": 1}).fit(Finetune(path, colour=Colour.RED))),
    ]

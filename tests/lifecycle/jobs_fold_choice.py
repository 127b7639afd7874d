# SPDX-License-Identifier: Apache-2.0
"""Jobs with ``fold="auto"``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from lightning_moefold import AutoFold, MoEFoldStrategy
from lightning_moefold.lifecycle import fold_choice
from lightning_moefold.modules import MoELayer
from lightning_moefold.testing.pieces import owned_pieces
from tests.strategy import finetune
from tests.strategy.finetune import Finetune
from tests.strategy.plain_modules import trainer

BATCH = {"global_batch_size": finetune.ROWS, "sequence_length": finetune.LENGTH}


def make(auto: AutoFold | None, arguments: dict[str, Any], **options: Any) -> pl.Trainer:
    strategy = MoEFoldStrategy(fold="auto", auto=auto, **options)
    return trainer(strategy, **{"precision": "64-true", "max_steps": 3, **arguments})


def fit(
    path: str, auto: dict[str, Any], options: dict[str, Any], early: bool = False, folder: str | None = None,
    ckpt_path: str | None = None, steps: int = 3,
) -> dict[str, Any]:  # fmt: skip
    module = Finetune(path, early=early)
    run = make(AutoFold(**auto), {"max_steps": steps}, **options)
    said: list[str] = []
    with Listening(said):
        run.fit(module, ckpt_path=ckpt_path)
    strategy = run.strategy
    seen: dict[str, Any] = {
        "fold": str(strategy.fold), "microbatches": strategy.settings.num_microbatches, "losses": module.report.losses,
        "weights": owned_pieces(module.model), "said": said, "recompute": strategy.settings.recompute,
        "schedule": strategy.settings.plan.schedule, "dispatcher": strategy.settings.dispatch.dispatcher,
    }  # fmt: skip
    if folder is not None:
        run.save_checkpoint(Path(folder, "auto.ckpt"))
    # A second entry point, and another Trainer, stay with the fold that the model has.
    run.validate(module)
    again = make(AutoFold(**auto), {}, **options)
    again.validate(module)
    assert again.strategy.fold == strategy.fold
    return seen


def reference(path: str, num_microbatches: int, steps: int) -> dict[str, Any]:
    """One process."""
    module = Finetune(path)
    run = finetune.make("", {"max_steps": steps}, num_microbatches=num_microbatches)
    run.fit(module)
    return {"losses": module.report.losses, "weights": owned_pieces(module.model)}


class Listening:
    """Collects what the strategy says on rank 0."""

    def __init__(self, said: list[str]) -> None:
        self.said = said

    def __enter__(self) -> None:
        self.before = fold_choice.announce
        fold_choice.announce = self.said.append

    def __exit__(self, *_: Any) -> None:
        fold_choice.announce = self.before


class Rows(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.rows = finetune.rows(64)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def loader(path: str) -> dict[str, Any]:
    """A DataLoader given to fit: rows of a batch on each data rank, which says the length too."""
    module = Finetune(path)
    run = make(None, {"max_steps": 2})
    run.fit(module, DataLoader(Rows(), batch_size=2))
    return {"fold": str(run.strategy.fold), "record": run.strategy._choice, "losses": module.report.losses}


class Own(Finetune):
    def configure_model(self) -> None:
        self.model = MoELayer(8, 4, 2, 16)


class AsksEarly(Finetune):
    def setup(self, stage: str) -> None:
        self.dp = self.trainer.strategy.dp_size


def refusals(path: str, auto: dict[str, Any], kind: str) -> str:
    module = {"": Finetune, "own": Own, "early": AsksEarly, "none": NoModel}[kind](path)
    try:
        make(AutoFold(**auto), {}).fit(module)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "ran"


class NoModel(Finetune):
    def configure_model(self) -> None:
        self.layer = torch.nn.Linear(2, 2)

# SPDX-License-Identifier: Apache-2.0
"""Jobs that save, load, and are interrupted while saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_moefold.checkpoint import drafts, sharded
from tests.strategy import finetune
from tests.strategy.finetune import Report


def save_and_go_on(path: str, fold: str, spec: dict[str, Any], folder: str) -> Report:
    """Two epochs of five steps without a stop, with a checkpoint after every step."""
    return finetune.fit(
        path, fold, spec, {"max_epochs": 2, "gradient_clip_val": 0.5}, folder=folder, every_n_train_steps=1
    )


def resume(path: str, folds: list[str], spec: dict[str, Any], checkpoint: str) -> list[Report]:
    arguments = {"max_epochs": 2, "gradient_clip_val": 0.5}
    return [finetune.fit(path, fold, spec, arguments, ckpt_path=checkpoint) for fold in folds]


class _Broken(Exception):
    pass


def crash(path: str, fold: str, folder: str, where: str) -> tuple[str, list[str], list[str]]:
    """Saves, then fails on one rank in the middle of saving to the same name.

    Returns:
        The error, and the files in the folder before and after.
    """
    module = finetune.Finetune(path)
    run = finetune.make(fold, {"max_steps": 1})
    run.fit(module)
    target = Path(folder, "model.ckpt")
    run.save_checkpoint(target)
    before = _tree(Path(folder))
    rank, last = dist.get_rank(), dist.get_world_size() - 1

    def fail(*_: Any, **__: Any) -> Any:
        raise _Broken("the disk is full")

    undo: list[tuple[Any, str, Any]] = []
    if where == "data" and rank == last:
        undo = [(sharded, "write_chunks", fail)]
    elif where == "meta" and rank == 0:
        undo = [(torch, "save", fail)]
    elif where == "finish" and rank == 0:
        undo = [(sharded, "write_list", fail)]
    elif where == "replace" and rank == 0:
        undo = [(sharded, "publish", fail)]
    elif where == "rename" and rank == 0:  # the second of two renames, where the system cannot exchange names
        replace = drafts.os.replace
        undo = [
            (drafts, "_exchange", lambda *_: False),
            (drafts.os, "replace", lambda a, b: fail() if str(a).endswith(".tmp") else replace(a, b)),
        ]
    saved = [(place, name, getattr(place, name)) for place, name, _ in undo]
    for place, name, value in undo:
        setattr(place, name, value)
    error = ""
    try:
        run.save_checkpoint(target)
    except Exception as failure:
        error = f"{type(failure).__name__}: {failure}"
    finally:
        for place, name, value in saved:
            setattr(place, name, value)
    dist.barrier()
    after = _tree(Path(folder))
    again = finetune.make(fold, {"max_steps": 2})
    again.fit(finetune.Finetune(path), ckpt_path=str(target))  # the old one still loads
    assert (again.strategy.resumed_step, again.global_step) == (1, 2)
    return error, before, after


def _tree(folder: Path) -> list[str]:
    dist.barrier()
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def save_two(path: str, fold: str, folder: str) -> None:
    """Two steps, saved after the second."""
    options = _plan(fold)
    module = finetune.Finetune(path)
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2)
    finetune.make(fold, {"max_steps": 2, "callbacks": [saver], "enable_checkpointing": True}, **options).fit(module)


def load_only(path: str, folds: list[str], checkpoint: str) -> list[Report]:
    """What each fold holds after loading, in training that has no step left to do."""
    reports = []
    for fold in folds:
        module = finetune.Finetune(path)
        finetune.make(fold, {"max_steps": 3}, **_plan(fold)).fit(module, ckpt_path=checkpoint)
        reports.append(module.report)
    return reports


def _plan(fold: str) -> dict[str, Any]:
    return {"num_microbatches": 2} if "pp" in fold else {}

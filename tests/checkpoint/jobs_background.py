# SPDX-License-Identifier: Apache-2.0
"""Runs that are saved in the background, by a disk that is slow, full or shut off."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_moefold.checkpoint import drafts, sharded
from lightning_moefold.lifecycle.background import BackgroundSaves
from tests.checkpoint.jobs_stores import replaced
from tests.strategy import finetune
from tests.strategy.jobs_bad_input import told

FITS = {"max_steps": 4, "enable_checkpointing": True}


class _Watch(Callback):
    """What lies in a folder after each step, and whether a save is under way."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.seen: list[tuple[list[str], bool]] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        names = sorted(p.name for p in self.folder.glob("*.ckpt") if (p / "meta.pt").exists())
        self.seen.append((names, trainer.strategy._background._thread is not None))


@contextlib.contextmanager
def slow_disk(seconds: float = 0.0, fails_at: int = -1, only_rank: int = -1) -> Iterator[None]:
    """Every file of tensors takes so long; the write of this number fails on this rank."""
    write, count = sharded.write_chunks, [0]

    def slowly(*arguments: Any) -> Any:
        count[0] += 1
        time.sleep(seconds)
        if count[0] == fails_at and dist.get_rank() == only_rank:
            raise OSError(28, "No space left on device")
        assert threading.current_thread() is not threading.main_thread()
        return write(*arguments)

    with replaced(sharded, "write_chunks", slowly):
        yield


def save(path: str, fold: str, folder: str, background: bool, **checkpoint: Any) -> list[tuple[list[str], bool]]:
    """Four steps with a checkpoint after each."""
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, **{"save_top_k": -1, **checkpoint})
    watch = _Watch(folder)
    callbacks: list[Any] = [saver, watch] if background else [saver]
    run = finetune.make(fold, {**FITS, "callbacks": callbacks}, async_save=background)
    with slow_disk(0.3) if background else contextlib.nullcontext():
        run.fit(finetune.Finetune(path))
    dist.barrier()
    return watch.seen


def fail(path: str, fold: str, folder: str, at: int) -> tuple[str, int, list[str]]:
    """The disk of the last rank is full at one save; what is told, after how many steps, and what is left."""
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=1, save_last=False)
    module = finetune.Finetune(path)
    run = finetune.make(fold, {**FITS, "callbacks": [saver]}, async_save=True)
    with slow_disk(0.1, at, dist.get_world_size() - 1):
        said = told(lambda: run.fit(module))
    dist.barrier()
    return said, len(module.report.losses), sorted(p.name for p in Path(folder).iterdir())


def refuse(path: str, folder: str) -> list[str]:
    """A link to what is not there yet, and a module that Lightning saves."""
    said = []
    for module, last in ((finetune.Finetune(path), "link"), (BoringModel(), True)):
        saver = ModelCheckpoint(folder, save_last=last, every_n_train_steps=1)
        arguments = {**FITS, "callbacks": [saver], "precision": "64-true" if last == "link" else "32-true"}
        said.append(told(lambda r=finetune.make("", arguments, async_save=True), m=module: r.fit(m)))  # type: ignore[misc]
    return said


def exit_early(path: str, folder: str) -> tuple[str, list[str]]:
    """An error of training while a save is under way: it is the one that is told, and the save is complete."""

    class _Fails(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, number: int) -> None:
            if number == 2:
                raise RuntimeError("of training")

    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    run = finetune.make("", {**FITS, "callbacks": [saver, _Fails()]}, async_save=True)
    with slow_disk(0.2):
        said = told(lambda: run.fit(finetune.Finetune(path)))
    return said, sorted(p.name for p in Path(folder).iterdir())


def no_copy() -> Any:
    """A bug to find: what is written is the state itself."""
    return replaced(BackgroundSaves, "_copy", lambda self, tensors: dict(tensors))


def start_anew(path: str, folder: str) -> list[str]:
    """A run where earlier ones were killed while saving, in its own directory and in that of an earlier version."""
    run = finetune.make("", {"max_steps": 1, "default_root_dir": folder, "enable_checkpointing": True, "logger": True})
    places = [Path(folder, "lightning_logs", f"version_{i}", "checkpoints") for i in (0, 1)]
    for place in places:
        place.mkdir(parents=True)
        (place / ".step=9.ckpt.0123abcd.tmp").mkdir()
        (place / ".step=9.ckpt.0123abcd.tmp" / "__0_0.distcp").write_bytes(b"half")
        (place / ".step=9.ckpt.0123abcd.lease").write_text(json.dumps(drafts._myself() | {"started": "1"}))
    run.fit(finetune.Finetune(path))
    return sorted(p.name for p in Path(folder, "lightning_logs").rglob("*") if p.name.startswith(".step"))

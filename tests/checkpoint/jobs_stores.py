# SPDX-License-Identifier: Apache-2.0
"""Jobs that save to stores and resume from there."""

from __future__ import annotations

import contextlib
from typing import Any

import fsspec
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_moefold.checkpoint import sharded, stores
from tests.checkpoint import shared_store
from tests.strategy import finetune
from tests.strategy.finetune import Report
from tests.strategy.jobs_bad_input import told

ARGUMENTS = {"max_epochs": 2, "gradient_clip_val": 0.5}


def save_and_resume(path: str, folds: list[str], directory: str) -> tuple[Report, Report, list[str]]:
    """A run with a checkpoint after every step, one that goes on from its third, and what lies in the directory."""
    shared_store.register()
    full = finetune.fit(path, folds[0], {}, ARGUMENTS, folder=directory, every_n_train_steps=1)
    resumed = finetune.fit(path, folds[1], {}, ARGUMENTS, ckpt_path=f"{directory}/step=3.ckpt")
    return full, resumed, tree(directory)


def tree(directory: str) -> list[str]:
    fs, inner = fsspec.core.url_to_fs(directory)
    return sorted(name.removeprefix(inner).strip("/") for name in fs.find(inner))


def default_root(path: str, root: str) -> tuple[str, list[str]]:
    """Checkpoints of a Trainer that is only told its root, the best of them evaluated; and what lies under the root."""
    shared_store.register()
    module = finetune.Finetune(path)
    run = finetune.make("tp2 | ep2", {"max_steps": 2, "default_root_dir": root, "enable_checkpointing": True})
    run.fit(module)
    run.validate(module, ckpt_path="best")
    return run.checkpoint_callback.best_model_path, tree(root)


def top_k(path: str, directory: str) -> list[str]:
    """Only the newest is kept, under any number of steps."""
    shared_store.register()
    finetune.fit(path, "", {}, ARGUMENTS, folder=directory, every_n_train_steps=1, save_top_k=1)
    return tree(directory)


class _Broken(Exception):
    pass


def crash(path: str, directory: str, where: str) -> tuple[str, list[str], list[str], int]:
    """Saves to one name again and fails in the middle of it; then resumes from that name."""
    shared_store.register()
    module = finetune.Finetune(path)
    run = finetune.make("", {"max_steps": 1})
    run.fit(module)
    target = f"{directory}/model.ckpt"
    run.save_checkpoint(target)
    before = tree(directory)

    def fail(*_: Any, **__: Any) -> Any:
        raise _Broken("the network is gone")

    with replaced(*{"data": (sharded, "write_chunks"), "meta": (stores, "write")}[where], fail):
        error = told(lambda: run.save_checkpoint(target))
    after = tree(directory)
    again = finetune.make("", {"max_steps": 2})
    again.fit(finetune.Finetune(path), ckpt_path=target)
    run.save_checkpoint(target)
    assert len(tree(directory)) == len(before), tree(directory)
    return error, before, after, again.global_step


@contextlib.contextmanager
def replaced(place: Any, name: str, value: Any) -> Any:
    kept = getattr(place, name)
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, kept)


def refusals(path: str, local: str, places: dict[str, str]) -> dict[str, str]:
    """What is told before the first step, for each directory of checkpoints; and for other doors."""

    def start(directory: str) -> None:
        module = finetune.Finetune(path)
        run = finetune.make(
            "| ep2", {"max_steps": 1, "callbacks": [ModelCheckpoint(directory)], "enable_checkpointing": True}
        )
        try:
            run.fit(module)
        finally:
            assert not module.report.losses, "it has trained"

    messages = {name: told(lambda d=place: start(d)) for name, place in places.items()}
    module = finetune.Finetune(path)
    run = finetune.make("| ep2", {"max_steps": 1})
    run.fit(module)
    assert module.model is not None
    model = module.model
    messages["save_pretrained"] = told(lambda: model.save_pretrained("memory://models/mine"))
    messages["by hand"] = told(lambda: run.save_checkpoint("memory://by/hand.ckpt"))
    messages["from a Path"] = told(lambda: run.save_checkpoint("s3:/bucket/mine.ckpt"))
    messages["nothing there"] = told(
        lambda: finetune.make("| ep2", {"max_steps": 1}).fit(finetune.Finetune(path), ckpt_path="memory://no/such.ckpt")
    )
    return messages

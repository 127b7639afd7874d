# SPDX-License-Identifier: Apache-2.0
"""``--ckpt_path last`` without a run: which checkpoint it means, what is said at the end of a fit, what a failed start leaves."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

from lightning_moefold.cli.resuming import agreed_last_checkpoint, endings, last_checkpoint, remove_empty_start
from lightning_moefold.errors import CheckpointError
from lightning_moefold.lifecycle.checkpoints import SharedCheckpoints
from lightning_moefold.testing import RankPool
from tests.cli import jobs_resuming


def checkpoint(folder: Path, name: str, when: int, complete: bool = True) -> Path:
    path = folder / name
    path.mkdir(parents=True)
    if complete:
        (path / "meta.pt").write_bytes(b"")
        os.utime(path / "meta.pt", (when, when))
    return path


def trainer_of(root: Path, *places: Path) -> Any:
    return SimpleNamespace(default_root_dir=str(root), checkpoint_callbacks=[ModelCheckpoint(str(p)) for p in places])


def test_last_is_the_newest_complete_checkpoint_of_all_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("TORCHELASTIC_MAX_RESTARTS", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    root = tmp_path / "runs"
    with pytest.raises(
        CheckpointError, match=r"--ckpt_path last finds no complete checkpoint in .*; leave it out to begin"
    ):
        last_checkpoint(trainer_of(root))
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert last_checkpoint(trainer_of(root)) is None  # the first start of a run that will be restarted
    assert "begins from the model" in capsys.readouterr().out
    first = checkpoint(root / "lightning_logs/version_0/checkpoints", "last.ckpt", 10)
    second = checkpoint(root / "lightning_logs/version_1/checkpoints", "last-v1.ckpt", 20)
    checkpoint(root / "lightning_logs/version_2/checkpoints", "last.ckpt", 30, complete=False)
    assert last_checkpoint(trainer_of(root)) == str(second)
    elsewhere = checkpoint(tmp_path / "own", "step=3.ckpt", 40)
    assert last_checkpoint(trainer_of(root, elsewhere.parent)) == str(elsewhere)
    os.utime(first / "meta.pt", (50, 50))
    assert last_checkpoint(trainer_of(root, elsewhere.parent)) == str(first)
    single = root / "lightning_logs/version_3/checkpoints/last.ckpt"  # of a module without a model in pieces
    single.parent.mkdir(parents=True)
    single.write_bytes(b"")
    assert last_checkpoint(trainer_of(root)) == str(single)


def test_all_ranks_resume_from_what_the_first_finds(pool: RankPool, tmp_path: Path) -> None:
    """Each rank looked for itself: a save of another run between two looks made them resume from different steps."""
    early, late, none = tmp_path / "early", tmp_path / "late", tmp_path / "none"
    first = str(checkpoint(early, "last.ckpt", 10))
    checkpoint(late, "last.ckpt", 10)
    checkpoint(late, "other.ckpt", 20)
    assert pool.run(jobs_resuming.last_of, [str(early), str(late)], ranks=2) == [first, first]
    for said in pool.run(jobs_resuming.last_of, [str(none), str(late)], ranks=2):
        assert f"finds no complete checkpoint in {none}" in str(said)


def test_started_processes_inherit_what_the_first_has_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEFOLD_LAST_CHECKPOINT", "")  # so that it is restored
    found = str(checkpoint(tmp_path, "last.ckpt", 10))

    def process(local_rank: int) -> Any:
        return SimpleNamespace(**vars(trainer_of(tmp_path)), strategy=None, local_rank=local_rank)

    assert agreed_last_checkpoint(process(0)) == found
    newer = str(checkpoint(tmp_path, "newer.ckpt", 20))
    monkeypatch.setattr(os, "getppid", os.getpid)
    assert agreed_last_checkpoint(process(1)) == found
    monkeypatch.setattr(os, "getppid", lambda: -1)  # what an earlier run of another process has left in the environment
    assert agreed_last_checkpoint(process(1)) == newer


def test_a_fit_says_why_it_ended() -> None:
    stopping = EarlyStopping("val/loss", patience=2)
    trainer: Any = SimpleNamespace(
        strategy=SimpleNamespace(resumed_step=None), global_step=8, max_steps=8, max_epochs=None, should_stop=False,
        estimated_stepping_batches=8, callbacks=[stopping],
    )  # fmt: skip
    assert endings(trainer) == []
    trainer.strategy.resumed_step = 8
    assert endings(trainer) == [
        "finished            the checkpoint is of step 8, and max_steps=8 leaves no step to make"
    ]
    trainer.strategy.resumed_step, trainer.should_stop, trainer.estimated_stepping_batches = 4, True, 20
    stopping.best_score, stopping.wait_count = torch.tensor(2.5), 2
    stopping.stopping_reason = EarlyStoppingReason.PATIENCE_EXHAUSTED
    told = "stopped early       after step 8: "
    assert endings(trainer) == [f"{told}val/loss has not improved on 2.5 in 2 validations"]
    trainer.callbacks = []
    assert endings(trainer) == [f"{told}a callback or the module has set trainer.should_stop"]


@pytest.mark.parametrize(("before", "told"), [
    ("tp1 | ep2", "resuming after step 12, fold tp1 | ep2 to tp2 | ep1: last.ckpt"),
    ("tp2 | ep1", "resuming after step 12, fold tp2 | ep1: last.ckpt"),
    (None, "resuming after step 12, fold tp2 | ep1: last.ckpt"),  # a single file of Lightning's, which names no fold
])  # fmt: skip
def test_a_resumed_run_says_where_it_goes_on(capsys: pytest.CaptureFixture[str], before: str | None, told: str) -> None:
    strategy: Any = SimpleNamespace(_fitting=True, _mesh=SimpleNamespace(fold="tp2 | ep1"), resumed_step=None)
    SharedCheckpoints._say_resumed(strategy, "last.ckpt", {"global_step": 12, "fold": before})
    assert capsys.readouterr().out.strip() == told
    assert strategy.resumed_step == 12
    strategy._fitting = False
    SharedCheckpoints._say_resumed(strategy, "last.ckpt", {"global_step": 12})
    assert not capsys.readouterr().out


@pytest.mark.parametrize("logger", ["csv", "tensorboard"])
def test_a_failed_start_leaves_no_version(tmp_path: Path, logger: str) -> None:
    if logger == "tensorboard":
        pytest.importorskip("tensorboard")
    began = time.time()
    kind = pl.loggers.CSVLogger if logger == "csv" else pl.loggers.TensorBoardLogger
    trainer: Any = SimpleNamespace(
        is_global_zero=True,
        global_step=0,
        strategy=SimpleNamespace(resumed_step=None),
        loggers=[kind(str(tmp_path), "logs")],
    )
    folder = Path(trainer.loggers[0].log_dir)

    def start() -> None:
        trainer.loggers[0].log_hyperparams({"lr": 1})
        trainer.loggers[0].save()
        (folder / "checkpoints").mkdir()
        (folder / "config.yaml").write_text("")

    start()
    assert list(folder.iterdir())
    remove_empty_start(trainer, began + 60)  # the folder of an earlier start
    assert folder.is_dir()
    (folder / "checkpoints" / "notes.txt").write_text("")
    remove_empty_start(trainer, began)  # something is in it
    assert folder.is_dir()
    (folder / "checkpoints" / "notes.txt").unlink()
    trainer.global_step = 1
    remove_empty_start(trainer, began)
    assert folder.is_dir()
    trainer.global_step = 0
    remove_empty_start(trainer, began)
    assert not folder.exists()

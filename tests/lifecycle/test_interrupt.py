# SPDX-License-Identifier: Apache-2.0
"""An interrupted run is saved, says where it stopped, and has the exit status of its signal."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import psutil
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins.environments import SLURMEnvironment

from lightning_moefold import MoEFoldStrategy
from lightning_moefold.callbacks import SaveOnInterrupt
from lightning_moefold.testing import make_checkpoint


def run_and_stop(arguments: list[str], number: signal.Signals, whom: str) -> tuple[int, str]:
    """Sends a signal to the first rank, the other, or both as a terminal does; returns the status and what is printed."""
    root = Path(__file__).parents[2]
    run = subprocess.Popen(
        [sys.executable, str(root / "tests/lifecycle/jobs_interrupt.py"), *arguments], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(root)}, cwd=arguments[1], start_new_session=True,
    )  # fmt: skip
    children: list[psutil.Process] = []
    try:
        assert run.stdout is not None
        while "at work" not in (line := run.stdout.readline()):
            assert line, "the run ended by itself"
        children = psutil.Process(run.pid).children(recursive=True)
        if whom == "both":
            os.killpg(run.pid, number)
        else:
            os.kill(run.pid if whom == "first" else children[0].pid, number)
        printed = run.communicate(timeout=120)[0]
        gone, alive = psutil.wait_procs(children, timeout=60)
        assert not alive
        return run.returncode, printed
    finally:
        for process in [*children, psutil.Process(run.pid)] if run.poll() is None else children:
            if process.is_running():
                process.kill()


@pytest.mark.more
def test_a_stopped_run_is_saved_and_goes_on(tmp_path: Path) -> None:
    path, folder = str(make_checkpoint(tmp_path / "model", "qwen3_moe", num_experts=4)), tmp_path / "saved"
    folder.mkdir()
    last, step = str(folder / "last.ckpt"), 0
    for number, whom in ((signal.SIGINT, "both"), (signal.SIGTERM, "first"), (signal.SIGTERM, "other")):
        status, printed = run_and_stop([path, str(folder), *([last] if step else [])], number, whom)
        found = re.search(rf"stopped by {number.name} after step (\d+), saved; resume with --ckpt_path (\S+)", printed)
        assert found is not None, printed
        assert found[2] == last
        assert int(found[1]) > step  # where the run before it stopped
        batches = {int(number) for number in re.findall(r"saved with (\d+) batches", printed)}
        assert batches == {3 * int(found[1])}  # a whole number of steps, the same on both ranks
        step = int(found[1])
        assert status == 128 + number


class _Signalled(BoringModel):
    """Gets a signal during the second batch."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__()
        self.number = number

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 1:
            os.kill(os.getpid(), self.number)
        return super().training_step(batch, batch_idx)


def _trainer(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        strategy=MoEFoldStrategy(), accelerator="cpu", devices=1, max_epochs=1, limit_train_batches=6, limit_val_batches=0,
        logger=False, enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks), default_root_dir=folder,
        **options,
    )  # fmt: skip


class _Named(ModelCheckpoint):
    CHECKPOINT_NAME_LAST = "last-{step}"


def test_the_last_checkpoint_has_the_name_that_the_run_gives_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``{step}`` was written as it stands, into a file that Lightning's own name does not match."""
    trainer = _trainer(tmp_path, SaveOnInterrupt(), _Named(tmp_path / "saved", every_n_train_steps=100))
    with pytest.raises(SystemExit) as ended:
        trainer.fit(_Signalled(signal.SIGTERM))
    assert ended.value.code == 143
    assert [p.name for p in (tmp_path / "saved").iterdir()] == ["last-step=2.ckpt"]
    assert "--ckpt_path" in capsys.readouterr().out


def test_a_requeue_signal_stays_slurms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``requeue_signal=SIGTERM`` saves, requeues and ends, as the user asked for; Ctrl-C ends the run as always."""
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/said\n')
    (tmp_path / "scontrol").chmod(0o755)
    for name, value in {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_JOB_NAME": "train",
        "SLURM_JOB_ID": "4242", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NNODES": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    before = signal.getsignal(signal.SIGTERM)
    environment = SLURMEnvironment(requeue_signal=signal.SIGTERM)
    trainer = _trainer(tmp_path, SaveOnInterrupt(), plugins=[environment], enable_checkpointing=False)
    with pytest.raises(SystemExit):
        trainer.fit(_Signalled(signal.SIGTERM))
    assert (tmp_path / "said").read_text() == "requeue 4242\n"
    assert [p.name for p in tmp_path.glob("*.ckpt")] == ["hpc_ckpt_1.ckpt"]
    assert trainer.global_step == 2
    assert signal.getsignal(signal.SIGTERM) == before
    trainer = _trainer(
        tmp_path / "other", SaveOnInterrupt(save=False), plugins=[environment], enable_checkpointing=False
    )
    with pytest.raises(SystemExit) as ended:
        trainer.fit(_Signalled(signal.SIGINT))
    assert ended.value.code == 130

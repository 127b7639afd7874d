# SPDX-License-Identifier: Apache-2.0
"""A scheduler that asks a run to end is not kept waiting."""

from __future__ import annotations

import inspect
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop

from lightning_moefold.lifecycle.signals import requeue_together, stop_quietly
from lightning_moefold.testing import make_checkpoint


@pytest.mark.slow
@pytest.mark.parametrize("who", ["first", "both"])
def test_sigterm_ends_all_ranks(tmp_path: Path, who: str) -> None:
    path = make_checkpoint(tmp_path / "model", "qwen3_moe", num_experts=4)
    root = Path(__file__).parents[2]
    run = subprocess.Popen(
        [sys.executable, str(root / "tests/lifecycle/jobs_signals.py"), str(path)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(root)}, cwd=tmp_path,
    )  # fmt: skip
    try:
        assert run.stdout is not None
        while "at work" not in (line := run.stdout.readline()):
            assert line, "the run ended by itself"
        processes = [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]
        for process in processes if who == "both" else processes[:1]:
            process.send_signal(signal.SIGTERM)
        gone, alive = psutil.wait_procs(processes[1:], timeout=60)
        run.wait(timeout=60)
        assert not alive
    finally:
        for process in psutil.Process(run.pid).children(recursive=True) if run.poll() is None else []:
            process.kill()
        run.kill()


def start_task(rank: int, ranks: int, port: int, path: Path, folder: Path) -> subprocess.Popen[str]:
    """A rank as ``srun`` starts it; ``scontrol`` notes what it is told."""
    root = Path(__file__).parents[2]
    environment = {
        **os.environ, "PYTHONPATH": str(root), "PATH": f"{folder.parent}:{os.environ['PATH']}", "SLURM_NTASKS": str(ranks),
        "SLURM_NTASKS_PER_NODE": str(ranks), "SLURM_NNODES": "1", "SLURM_JOB_NAME": "train", "SLURM_JOB_ID": "4242",
        "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    command = [sys.executable, str(root / "tests/lifecycle/jobs_requeue.py"), str(path), str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def read_steps(task: subprocess.Popen[str], count: int) -> list[list[int]]:
    """The next steps: their numbers, and their rows."""
    assert task.stdout is not None
    found: list[list[int]] = []
    while len(found) < count:
        line = task.stdout.readline()
        assert line, "the run ended by itself"
        if line.startswith("step "):
            found.append([int(word) for word in line.split()[1:]])
    return found


@pytest.mark.slow
def test_a_requeued_job_goes_on(tmp_path: Path) -> None:
    """SIGUSR1 reaches one rank only: both save after the same step and the job is requeued; then it resumes on one rank."""
    path, folder = make_checkpoint(tmp_path / "model", "qwen3_moe", num_experts=4), tmp_path / "run"
    folder.mkdir()
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/said\n')
    (tmp_path / "scontrol").chmod(0o755)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    tasks = [start_task(rank, 2, port, path, folder) for rank in range(2)]
    try:
        read_steps(tasks[0], 3)
        tasks[1].send_signal(signal.SIGUSR1)
        until = time.monotonic() + 120
        while not (tmp_path / "said").exists():
            assert time.monotonic() < until
            read_steps(tasks[0], 1)
        assert (tmp_path / "said").read_text() == "requeue 4242\n"
        assert [p.name for p in folder.iterdir()] == ["hpc_ckpt_1.ckpt"]
        read_steps(tasks[0], 5)  # it goes on until the scheduler ends it
        for task in tasks:
            task.kill()
        (folder / ".hpc-ckpt-2.ckpt.0123abcd.tmp").mkdir()  # as a save that was killed leaves it
        tasks += [start_task(0, 1, port, path, folder)]
        [[step, *rows]] = read_steps(tasks[2], 1)
        assert step > 2
        assert rows == [2 * step, 2 * step + 1]
    finally:
        for task in tasks:
            task.kill()
            task.wait()


def test_a_validation_before_training_leaves_sigterm_to_slurm() -> None:
    """It replaces Lightning's handler of SIGTERM first; what takes its place then stopped the run before it was saved."""

    def tells(*_: Any) -> None: ...

    def requeues(*_: Any) -> None: ...

    connector = SimpleNamespace(_sigterm_notifier_fn=tells, _slurm_sigusr_handler_fn=requeues, received_sigterm=False)
    trainer: Any = SimpleNamespace(
        _signal_connector=connector, strategy=SimpleNamespace(launcher=None), callbacks=[], world_size=1, is_global_zero=True,
        _accelerator_connector=SimpleNamespace(cluster_environment=SimpleNamespace(requeue_signal=signal.SIGTERM)),
    )  # fmt: skip

    def composed(number: int, frame: Any) -> None:
        for handler in composed.signal_handlers:  # type: ignore[attr-defined]
            handler(number, frame)

    composed.signal_handlers = [tells, requeues]  # type: ignore[attr-defined]
    before = signal.signal(signal.SIGTERM, composed)
    try:
        stop_quietly(trainer)
        requeue_together(trainer)
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not connector.received_sigterm
    assert [callback._told for callback in trainer.callbacks] == [signal.SIGTERM]


def test_ranks_wait_for_each_other_before_each_batch() -> None:
    """By Lightning's own broadcast, whose value the host reads: so none is more than a batch ahead, as ``SameBatch`` needs it."""
    assert "self._broadcast_sigterm_tensor()" in inspect.getsource(_TrainingEpochLoop.advance)
    assert ".item()" in inspect.getsource(_TrainingEpochLoop._broadcast_sigterm_tensor)

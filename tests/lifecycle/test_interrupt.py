# SPDX-License-Identifier: Apache-2.0
"""An interrupted run is saved, says where it stopped, and has the exit status of its signal."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

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

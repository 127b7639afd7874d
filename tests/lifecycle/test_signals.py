# SPDX-License-Identifier: Apache-2.0
"""A scheduler that asks a run to end is not kept waiting."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

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

# SPDX-License-Identifier: Apache-2.0
"""The campaigns of docs/checkpoints.md, in short: each ends with status 0, and says what it has done."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _run(script: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.more
def test_kills() -> None:
    said = _run("kills.py", "--kills", "4")
    assert said.count("4 kills on 2 ranks") == 6
    assert "0 faults so far" in said


@pytest.mark.more
def test_damage() -> None:
    readers = ("training", "config", "cache", "trace")
    said = _run("damage.py", "--cases", "30", "--readers", *readers)
    for reader in readers:
        assert f"{reader}: 30 cases in" in said


@pytest.mark.slow
def test_fold_pairs() -> None:
    said = _run("fold_pairs.py", "--ranks", "2", "--families", "qwen2_moe", "--reach", "1")
    assert "8 pairs on 2 ranks" in said
    assert "0 faults" in said


@pytest.mark.slow
def test_elastic() -> None:
    assert "largest relative difference of a loss" in _run("elastic.py")


@pytest.mark.more
def test_illegal_requests() -> None:
    said = _run("illegal.py", "--cases", "200", "--surfaces", "strategy")
    assert "strategy: 200 requests" in said


@pytest.mark.slow
def test_illegal_commands() -> None:
    said = _run("illegal.py", "--cases", "100", "--surfaces", "cli", "fit")
    assert "cli: 50 requests" in said

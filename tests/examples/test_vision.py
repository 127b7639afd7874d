# SPDX-License-Identifier: Apache-2.0
"""The vision example, as a user starts it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


FOLDS = [
    pytest.param(["tp2 | ep2"], marks=pytest.mark.slow),
    pytest.param(["pp2", "--microbatches", "4"], marks=pytest.mark.slow),
]


@pytest.mark.parametrize("fold", FOLDS, ids=["tensors", "pipeline"])
def test_vision_example_learns_under_a_fold(fold: list[str]) -> None:
    command = [
        sys.executable,
        "examples/vision.py",
        "--devices",
        "2",
        "--epochs",
        "3",
        "--images",
        "256",
        "--fold",
        *fold,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = re.search(r"val/accuracy (\d\.\d+) over disc, square, cross, ring; loss (\d\.\d+)", done.stdout)
    assert found is not None, done.stdout
    assert float(found[1]) > 0.3  # of four classes
    assert float(found[2]) < 1.386  # ln 4, what guessing costs
    assert "Warning" not in done.stderr, done.stderr

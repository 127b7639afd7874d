# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of layers run, at a size that measures nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = ["--tokens", "64", "--hidden", "32", "--rounds", "2"]

pytestmark = pytest.mark.slow


def _rows(script: str, *arguments: str) -> list[list[str]]:
    """The cells of the table that a benchmark prints, without its head."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "benchmarks" / script), *SMALL, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_one_layer() -> None:
    rows = _rows("moe_layer.py", "--ffn", "32", "--cases", "8/2", "--threads", "1")
    assert len(rows) == 2 * 5  # two dtypes; matmul, grouped_mm, ours, eager, dense
    assert {row[2] for row in rows} >= {"moefold", "HF grouped_mm", "HF eager"}


def test_experts_on_two_ranks() -> None:
    rows = _rows("expert_parallel.py", "--ffn", "32", "--experts", "8", "--routings", "heavy")
    sent = {(row[1], row[2]): float(row[7]) for row in rows}
    assert ("dropless", "moefold alltoall") in sent
    assert ("dropless", "HF grouped_mm, DDP") in sent


def test_dispatch_alone() -> None:
    rows = _rows("dispatch.py", "--ranks", "2", "--experts", "8")
    # Forward and backward: counts, tokens, weights and results; gradients of the last three.
    assert {row[1]: (row[8], row[11]) for row in rows} == {
        "alltoall": ("4, 3", "1, 0"),
        "alltoall, 2 chunks": ("7, 6", "1, 0"),
        "deduplicated": ("4, 3", "1, 0"),
        "allgather": ("4, 3", "1, 0"),
    }


def test_trace_of_overlap(tmp_path: Path) -> None:
    trace, picture = tmp_path / "trace.json", tmp_path / "trace.png"
    rows = _rows("overlap.py", "--ffn", "32", "--experts", "8", "--trace", str(trace), "--picture", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [row[:2] for row in rows] == [["1", "forward"], ["1", "backward"], ["4", "forward"], ["4", "backward"]]
    events = json.loads(trace.read_text())["traceEvents"]
    for rank in (0, 1):
        # Tokens, weights and results of four chunks, forward and backward.
        assert sum(e["pid"] == rank and e["name"] == "exchange" for e in events) == 2 * 3 * 4
        assert sum(e["pid"] == rank and e["name"] == "experts" for e in events) == 2 * 4

# SPDX-License-Identifier: Apache-2.0
"""``moefold balance`` from its arguments to what it prints and draws."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lightning_moefold.balance.policies import POLICIES
from lightning_moefold.balance.workloads import generate
from lightning_moefold.cli.main import main


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    made = generate("hot_rank", records=6, layers=2, sources=4, experts=8)
    np.savez(tmp_path / "trace.npz", counts=made.counts_NLSE.astype(np.uint16), iterations=made.iterations_N)
    return tmp_path / "trace.npz"


def test_json_and_pictures(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["balance", str(trace), "--ep", "4", "--json", "--plot", str(tmp_path / "plots")]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["policy"]: row for row in found["policies"]}
    assert list(rows) == list(POLICIES)
    assert {"policy", "imbalance", "moved_bytes", "migrating_checks", "step_time_s"} <= set(rows["joint"])
    assert rows["contiguous"]["moved_bytes"] == rows["contiguous"]["migrating_checks"] == 0
    assert rows["contiguous"]["imbalance"] > 2 > 1.2 > rows["joint"]["imbalance"] >= 1
    assert rows["smartmoe_greedy"]["moved_bytes"] > 0
    assert rows["joint"]["step_time_s"] == min(row["step_time_s"] for row in found["policies"])
    for row in found["policies"]:
        assert row["step_time_s"] == pytest.approx(row["compute_s"] + row["copies_s"] + row["moves_s"])
    pictures = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert pictures == ["placement.png", "policies.png", "rank_load.png"]
    assert all((tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


def test_table(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--ep",
        "2",
        "--etp",
        "2",
        "--policies",
        "contiguous, joint",
        "--every",
        "2",
        "--num-microbatches",
        "2",
    ]
    assert main(["balance", str(trace), *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "trace.npz: 3 checks (steps 1 to 41), 2 layers, 8 experts on ep=2, etp=2"
    assert [line.split()[0] for line in lines[3:6]] == ["policy", "contiguous", "joint"]
    assert lines[-1].startswith("* joint is the fastest: ")
    assert main(["balance", "balanced", "--ep", "4", "--policies", "contiguous,joint", "--every", "10"]) == 0
    assert "No policy gains 1%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ep", "1"], "ep=1 leaves nothing to balance, every rank holds all experts; give at least 2."),
        (["--ep", "3"], "8 experts do not go over ep=3; use ep in 2, 4, 8."),
        (["--ep", "4", "--policies", "join"], "policy 'join' is not known (did you mean joint?); use contiguous, "),
        (["--ep", "4", "--policies", ","], "--policies names none; use contiguous, "),
        (
            ["--ep", "4", "--max-copies-per-rank", "0"],
            "--max-copies-per-rank 0 must be at least 1; to see moves alone, use",
        ),
        (["--ep", "4", "--every", "0"], "--every 0 must be at least 1."),
        (
            ["--ep", "4", "--model", "mixtral-8x7b"],
            "trace.npz has 2 layers of 8 experts, mixtral-8x7b has 32 of 8; give",
        ),
        (["--ep", "4", "--hardware", "abacus"], "hardware 'abacus' is not known"),
    ],
)
def test_bad_input_is_one_sentence(
    trace: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["balance", str(trace), *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"moefold balance: {message}")
    assert said.count("\n") == 1


def test_bad_files_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "flat.npz", counts=np.ones((4, 8), dtype=int))
    for path, message in (
        ("none.npz", "does not exist"),
        ("flat.npz", "counts have the shape (4, 8); give [iterations,"),
    ):
        assert main(["balance", str(tmp_path / path), "--ep", "4"]) == 2
        assert message in capsys.readouterr().err

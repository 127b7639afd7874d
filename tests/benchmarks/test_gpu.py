# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/gpu.py` runs whole in small on CPU, and no part spoils another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

#: Stands in for the worker: one try is well, one ends the process, one hangs, one fails, one is wrong, one is well.
FAKE = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {benchmarks!r})
from gpu_parts.record import NotHere, Record

def fail():
    raise ValueError("planted")

def not_here():
    raise NotHere("needs a GPU")

arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
record = Record(arguments["--worker"], Path(arguments["--work"]), float(arguments["--budget"]))
print("start", flush=True)
tries = dict(well=dict, dies=lambda: os._exit(9), hangs=lambda: time.sleep(60), fails=fail, wrong=lambda: dict(ok=False),
             elsewhere=not_here, last=lambda: dict(ms=1.5))
for name, function in tries.items():
    record.attempt("table", name, function, limit=1)
record.data["status"] = "done"
record.save()
"""


def _run(*arguments: str, timeout: float = 900) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The driver with a stand-in for its worker."""
    from gpu_parts import driver

    door = tmp_path / "door.py"
    door.write_text(FAKE.format(benchmarks=str(ROOT / "benchmarks")))
    monkeypatch.setattr(driver, "DOOR", door)
    return driver


def _read(out: Path) -> dict[str, Any]:
    parts: dict[str, Any] = json.loads((out / "gpu.json").read_text())["parts"]
    return parts


def test_a_try_that_dies_hangs_or_fails_costs_itself_only(driver: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert driver.drive(out, ["machine", "packed"], ["packed"], False, 120, False) == 0
    assert list(_read(out)) == ["machine"]
    found = _read(out)["machine"]
    assert found["status"] == "done"
    assert found["seconds"] > 1  # those of all its processes
    assert found["tries"] == {
        "table / well": "ok", "table / dies": "ended", "table / hangs": "ended", "table / fails": "failed",
        "table / wrong": "WRONG", "table / elsewhere": "not here", "table / last": "ok",
    }  # fmt: skip
    assert "exit status 9" in found["errors"]["table / dies"]["line"]
    assert "more than 1 s" in found["errors"]["table / hangs"]["line"]
    assert found["errors"]["table / fails"]["line"] == "ValueError: planted"
    assert "in fail" in found["errors"]["table / fails"]["trace"]
    text = (out / "gpu.md").read_text()
    assert "| last |  | 1.500 |" in text
    assert "ValueError: planted" in text
    assert (out / "gpu.log").read_text().count("start") == 3  # one process more for each that ended


def test_a_budget_leaves_parts_out_and_resume_keeps_what_is_there(
    driver: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert driver.drive(out, ["layers", "launches"], [], False, 30, False) == 0
    found = _read(out)
    assert found["layers"]["status"].startswith("left out: 30 s are left")
    assert found["launches"]["status"] == "done"
    starts = (out / "gpu.log").read_text().count("start")
    assert driver.drive(out, ["launches"], [], True, 60, False) == 0
    assert "launches: known already" in capsys.readouterr().out
    assert (out / "gpu.log").read_text().count("start") == starts
    assert list(_read(out)) == ["layers", "launches"]


@pytest.mark.more
def test_a_budget_ends_a_part(driver: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(driver.PARTS, "machine", driver.Budget(12, 1))
    driver.DOOR.write_text(driver.DOOR.read_text().replace("limit=1", "limit=50").replace("os._exit(9)", "{}"))
    assert driver.drive(tmp_path / "out", ["machine"], [], False, 60, False) == 0
    found = _read(tmp_path / "out")["machine"]
    assert "its budget" in found["status"]
    assert 8 < found["seconds"] < 30
    assert found["tries"]["table / well"] == "ok"


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--only", "layer", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "unknown part 'layer': there are machine, tests" in done.stderr


@pytest.mark.slow
def test_rehearsal(tmp_path: Path) -> None:
    """Every try of every part, so that nothing but the GPU itself can surprise."""
    text = _run("--rehearse", "--out", str(tmp_path))
    parts = _read(tmp_path)
    assert list(parts) == ["machine", "tests", "correct", "layers", "packed", "pieces", "trainer", "launches"]
    assert {name: found["errors"] for name, found in parts.items() if found["errors"]} == {}
    assert {found["status"] for found in parts.values()} == {"done"}
    assert not any(found["left_out"] for found in parts.values())
    outcomes = {f"{name}: {key}": outcome for name, found in parts.items() for key, outcome in found["tries"].items()}
    assert set(outcomes.values()) == {"ok", "not here"}
    assert all("varlen" in key for key, outcome in outcomes.items() if outcome == "not here")
    assert parts["tests"]["tables"]["outcomes"][0]["failed"] == 0
    layers = [rows for title, rows in parts["layers"]["tables"].items() if "one decoder layer" in title]
    assert {row["what"] for row in layers[0]} >= {
        "moefold",
        "moefold, compiled",
        "HF grouped_mm",
        "HF eager",
        "products alone",
    }
    losses = parts["trainer"]["tables"]["losses"]
    assert max(row["difference"] for row in losses) < 1e-3
    assert "machine   done" in text
    assert {path.name for path in tmp_path.iterdir()} == {"gpu.json", "gpu.md", "gpu.log"}

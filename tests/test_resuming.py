# SPDX-License-Identifier: Apache-2.0
"""A run of the tests that is killed goes on where it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import resuming

SUITE = """
import os, signal, pytest

@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("fold", ["tp1 cp1 dp2 pp1 | etp1 ep1 edp2", "tp2 cp1 dp1 pp1 | etp1 ep2 edp1"])
def test_fold(fold, family, record_property):
    record_property("fold", fold)
    record_property("family", family)
    record_property("error", 2e-13 if "ep2" in fold else 1e-13)
    if os.environ.get("KILLED_BY") == family and fold.startswith("tp2"):
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.environ.get("FAILED_BY") != family
"""


def _run(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(folder), "-p", "tests.resuming", "-p"]
    command += [
        "no:cacheprovider",
        "--resume",
        "--ledger",
        str(folder / "build" / "ledger.jsonl"),
        *options,
        str(folder),
    ]
    environ = {**os.environ, "PYTHONPATH": str(resuming.ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **environment}
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.more
def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "test_suite.py").write_text(SUITE)
    killed = _run(tmp_path, KILLED_BY="qwen3_moe")
    assert killed.returncode == -signal.SIGKILL
    failed = _run(tmp_path, FAILED_BY="qwen3_moe")
    assert failed.returncode == pytest.ExitCode.TESTS_FAILED
    assert "1 failed, 3 deselected" in failed.stdout
    last = _run(tmp_path)
    assert last.returncode == pytest.ExitCode.OK
    assert "1 passed, 3 deselected" in last.stdout, "only what had not passed"
    assert "4 cases under 2 folds; the largest error is 2.0e-13 (tp2 cp1 dp1 pp1 | etp1 ep2 edp1)" in last.stdout
    again = _run(tmp_path)
    assert again.returncode == pytest.ExitCode.OK
    assert "4 deselected" in again.stdout


@pytest.mark.more
def test_a_run_of_two_processes_goes_on_where_one_was_killed(tmp_path: Path) -> None:
    """Another process takes its place, which leaves out no test that passed meanwhile."""
    (tmp_path / "test_suite.py").write_text(SUITE)
    two = ("-p", "xdist", "-n", "2", "--dist", "worksteal")
    killed = _run(tmp_path, "--fresh", *two, KILLED_BY="qwen3_moe")
    assert "1 failed, 3 passed" in killed.stdout
    assert len((tmp_path / "build" / "ledger.jsonl").read_text().splitlines()) == 3, (
        "one process writes, each test once"
    )
    assert "1 passed" in _run(tmp_path, *two).stdout
    assert _run(tmp_path, *two).returncode == pytest.ExitCode.OK


def test_another_version_of_the_code_is_another_run(tmp_path: Path) -> None:
    file = tmp_path / "ledger.jsonl"
    resuming.Ledger(file, "one").add("test", 1.0, {})
    file.write_text(file.read_text() + '{"version": "one", "te')  # killed while it wrote
    ledger = resuming.Ledger(file, "one")
    ledger.add("other", 1.0, {})
    assert set(resuming.Ledger(file, "one").passed) == {"test", "other"}
    assert not resuming.Ledger(file, "two").passed


def test_any_change_of_a_file_is_another_version(tmp_path: Path) -> None:
    (tmp_path / "lightning_moefold").mkdir()
    (tmp_path / "pyproject.toml").write_text("")
    versions = {resuming.code_version(tmp_path)}
    for text in ("a = 1", "a = 2"):
        (tmp_path / "lightning_moefold" / "fold.py").write_text(text)
        versions.add(resuming.code_version(tmp_path))
    assert len(versions) == 3

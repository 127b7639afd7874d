# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin for `make test-all`: a run that was stopped goes on where it was, and a table tells what it found.

With ``--resume``, every test that passes is written down in ``build/test-all.jsonl`` at once, under the version of the code.
A later run with ``--resume`` leaves out what has passed under the same version; ``--fresh`` begins anew. A change of any
Python file of the package or the tests, of ``pyproject.toml``, or of a library on which results depend is another version.

Tests of the matrix give ``record_property`` their fold, family and largest error; at the end these are a table, whichever
run found them.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
LIBRARIES = ("torch", "lightning", "transformers", "numpy", "safetensors")


def code_version(root: Path = ROOT) -> str:
    """A hash of everything on which a result may depend."""
    digest = hashlib.sha256()
    files = [root / "pyproject.toml", *sorted((root / "lightning_moefold").rglob("*.py"))]
    files += [*sorted((root / "tests").rglob("*.py")), *sorted((root / "examples").rglob("*.py"))]
    for file in files:
        digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes() + b"\0")
    for library in LIBRARIES:
        digest.update(f"{library} {importlib.metadata.version(library)}\n".encode())
    digest.update(platform.python_version().encode())
    return digest.hexdigest()[:16]


class Ledger:
    """What has passed, one line of JSON each.

    Args:
        file: Made if absent. Only lines of ``version`` count.
        version: Of the code.
    """

    def __init__(self, file: Path, version: str) -> None:
        self.file, self.version = file, version
        self.passed: dict[str, dict[str, Any]] = {}
        for line in file.read_text().splitlines() if file.exists() else []:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # the line that was being written when a run was killed
            if entry["version"] == version:
                self.passed[entry["test"]] = entry

    def add(self, test: str, seconds: float, properties: dict[str, Any]) -> None:
        """Writes at once: the run may be killed any moment."""
        entry = {"version": self.version, "test": test, "seconds": round(seconds, 2), **properties}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as out:
            out.write(("" if self._ends_well() else "\n") + json.dumps(entry) + "\n")
        self.passed[test] = entry

    def _ends_well(self) -> bool:
        with self.file.open("rb") as text:
            size = text.seek(0, 2)
            text.seek(max(0, size - 1))
            return text.read() in (b"", b"\n")

    def table(self) -> list[str]:
        """Fold by family: largest error and seconds, of the tests that told them."""
        cells: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
        for entry in self.passed.values():
            if "fold" in entry:
                cells[entry["fold"]][entry["family"]].append(entry)
        families = sorted({family for row in cells.values() for family in row})
        width = max((len(fold) for fold in cells), default=0)
        lines = [" ".join([" " * width, *(f"{family:>18}" for family in families)])]
        for fold, row in sorted(cells.items(), key=lambda item: _order(item[0])):
            lines.append(" ".join([f"{fold:<{width}}", *(_cell(row.get(family, [])) for family in families)]))
        worst = max(
            (e for row in cells.values() for es in row.values() for e in es), key=lambda e: e["error"], default=None
        )
        if worst is None:
            return []
        number = sum(len(entries) for row in cells.values() for entries in row.values())
        return [
            *lines,
            f"{number} cases under {len(cells)} folds; the largest error is {worst['error']:.1e} ({worst['fold']})",
        ]


def _cell(entries: list[dict[str, Any]]) -> str:
    """Largest error, seconds in all, and how many cases where there are several."""
    if not entries:
        return f"{'-':>18}"
    times = f" x{len(entries)}" if len(entries) > 1 else ""
    return f"{max(e['error'] for e in entries):.0e} {sum(e['seconds'] for e in entries):.1f}s{times}".rjust(18)


def _order(fold: str) -> tuple[int, str]:
    sizes = [int("".join(filter(str.isdigit, part))) for part in fold.split("|")[0].split()]
    world = 1
    for size in sizes:
        world *= size
    return world, fold


# ---- hooks -----------------------------------------------------------------------------------------------------------

_LEDGER = pytest.StashKey[Ledger]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("moefold")
    group.addoption(
        "--resume", action="store_true", help="leave out what has passed under the same version of the code"
    )
    group.addoption("--fresh", action="store_true", help="with --resume: forget what has passed")
    group.addoption("--ledger", type=Path, default=ROOT / "build" / "test-all.jsonl", help="where --resume writes")


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--resume"):
        return
    if hasattr(config, "workerinput"):  # of pytest-xdist: the first process hears of all tests, and writes
        config.pluginmanager.register(_Selection(set(config.workerinput["moefold_passed"])), "moefold-selection")
        return
    file: Path = config.getoption("--ledger")
    if config.getoption("--fresh"):
        file.unlink(missing_ok=True)
    config.stash[_LEDGER] = Ledger(file, code_version())
    config.pluginmanager.register(_Recorder(config.stash[_LEDGER]), "moefold-ledger")


class _Selection:
    """Leaves out tests.

    Args:
        earlier: The tests that passed before this run.
    """

    def __init__(self, earlier: set[str]) -> None:
        self.earlier = earlier

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        done = [item for item in items if item.nodeid in self.earlier]
        if done:
            config.hook.pytest_deselected(items=done)
            items[:] = [item for item in items if item.nodeid not in self.earlier]


class _Recorder(_Selection):
    def __init__(self, ledger: Ledger) -> None:
        super().__init__(set(ledger.passed))
        self.ledger = ledger
        self._seconds: dict[str, float] = {}

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Tells a worker what this run leaves out; one that replaces a worker that died leaves out no more."""
        node.workerinput["moefold_passed"] = sorted(self.earlier)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self._seconds[report.nodeid] = report.duration
        elif report.when == "teardown" and report.passed and report.nodeid in self._seconds:
            self.ledger.add(report.nodeid, self._seconds.pop(report.nodeid), dict(report.user_properties))

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.earlier:
            session.exitstatus = pytest.ExitCode.OK  # everything has passed before

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if table := self.ledger.table():
            terminalreporter.section("folds against one process (float64): largest relative error, seconds")
            terminalreporter.write_line("\n".join(table))
        if self.earlier:
            terminalreporter.write_line(
                f"{len(self.earlier)} tests passed in an earlier run of this version of the code ({self.ledger.file}); "
                "--fresh runs them again."
            )

# SPDX-License-Identifier: Apache-2.0
"""What the files beside the code say about versions is one thing."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import lightning_moefold

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    reader = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    parsed: dict[str, Any] = reader.loads((ROOT / "pyproject.toml").read_text())
    return parsed


def test_the_version_stands_in_one_place(project: dict[str, Any]) -> None:
    assert project["project"]["dynamic"] == ["version"]
    file = ROOT / project["tool"]["hatch"]["version"]["path"]
    assert re.findall(r'^__version__ = "(.+)"$', file.read_text(), re.MULTILINE) == [lightning_moefold.__version__]
    assert f"## [{lightning_moefold.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_commits_are_checked_by_the_same_ruff(project: dict[str, Any]) -> None:
    [repository] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    [pinned] = [line for line in project["project"]["optional-dependencies"]["dev"] if line.startswith("ruff")]
    assert pinned == f"ruff=={repository['rev'].removeprefix('v')}"


def test_pages_name_the_torch_that_is_allowed(project: dict[str, Any]) -> None:
    [torch] = [line for line in project["project"]["dependencies"] if line.startswith("torch>")]
    least, beyond = re.fullmatch(r"torch>=(2\.\d+),<2\.(\d+)", torch).groups()  # type: ignore[union-attr]
    for page in ("README.md", "docs/compatibility.md", "docs/getting-started.md"):
        assert f"{least} to 2.{int(beyond) - 1}" in (ROOT / page).read_text(), page


def test_files_for_github_can_be_read() -> None:
    for file in [*(ROOT / ".github").rglob("*.yml"), ROOT / "CITATION.cff"]:
        assert isinstance(yaml.safe_load(file.read_text()), dict), file
    steps = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["run"]["steps"]
    assert ".ci/run" in [step.get("run") for step in steps]

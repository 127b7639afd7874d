# SPDX-License-Identifier: Apache-2.0
"""The code of docs/callbacks.md runs, and the page knows every metric that is logged."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from lightning.fabric.utilities.distributed import _destroy_dist_connection

from lightning_moefold.cli.main import main
from tests.callbacks.test_monitors import LOAD_KEYS, TIME_KEYS

PAGE = Path(__file__).parents[2] / "docs" / "callbacks.md"


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """A Trainer in this process leaves variables and a process group behind."""
    before = dict(os.environ)
    yield
    _destroy_dist_connection()
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.usefixtures("nothing_left")
def test_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for language, block in re.findall(r"```(python|bash)\n(.*?)```", PAGE.read_text(), re.DOTALL):
        if language == "python":
            exec(compile(block, PAGE.name, "exec"), names)
        else:
            assert main(block.split()[1:]) == 0
    printed = capsys.readouterr().out
    assert "[ 4  8 12] [0 1] (3, 2, 8)" in printed
    assert sorted(path.stem for path in Path("runs/tiny/plots").iterdir()) == [
        "expert_load",
        "loss",
        "memory",
        "speed",
    ]
    with next(Path("runs").rglob("metrics.csv")).open() as file:
        logged = set(next(csv.reader(file))) - {"epoch", "step", "train/loss"}
    assert logged >= {*TIME_KEYS, *LOAD_KEYS} - {f"moe/layer_2/{name}" for name in ("cv", "dead_expert_frac")}
    page = PAGE.read_text()
    for name in logged:
        name = re.sub(r"layer_\d+", "layer_{i}", name)
        stem, _, tail = name.rpartition("_")
        assert f"`{name}`" in page or (f"`{stem}_" in page and f"`_{tail}`" in page), name

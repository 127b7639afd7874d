# SPDX-License-Identifier: Apache-2.0
"""Every benchmark can be imported, and says what its options are; ``tests/cuda_on_cpu`` runs `cuda_bytes.py`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

#: Takes the place of kernels wherever it is imported.
ELSEWHERE = {"cuda_bytes"}
#: What others import; it has no command line.
SHARED = {"measuring", "training"}
SCRIPTS = {file.stem for file in (Path(__file__).parents[2] / "benchmarks").glob("*.py")} - ELSEWHERE - SHARED


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_options(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])  # some add to it
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(name).main()
    assert f"usage: {name}.py" in capsys.readouterr().out

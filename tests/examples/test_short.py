# SPDX-License-Identifier: Apache-2.0
"""The examples that make their own data run on ranks, and learn."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps", "first"), [("lora", 12, None), ("dpo", 8, 0.693)])
def test_an_example(name: str, steps: int, first: float | None, tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "examples" / f"{name}.py", "--steps", str(steps), "--output", tmp_path]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    losses = [float(number) for number in re.findall(r"\d+\.\d{3}", done.stdout.splitlines()[-2])]
    assert losses[-1 if first is None else 0] < (first or losses[0])
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()

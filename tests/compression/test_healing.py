# SPDX-License-Identifier: Apache-2.0
"""A packed student learns from its teacher under folds as the zeroed one does alone; the example of healing runs."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_moefold import MoECausalLM
from lightning_moefold.recipes import top_log_probabilities
from lightning_moefold.testing import RankPool
from tests.compression.test_packed import both_forms
from tests.compression.test_pruning import ours
from tests.recipes import distilled
from tests.recipes.running import ROOT


def rows_of_teacher(path: Path) -> list[dict[str, torch.Tensor]]:
    """Random rows with what the model in ``path`` says of them."""
    teacher, draw, rows = MoECausalLM.from_pretrained(path).eval(), torch.Generator().manual_seed(3), []
    for number in range(12):
        ids = torch.randint(3, 96, (10,), generator=draw)
        ids[0] = number
        with torch.no_grad():
            logprobs, tokens = top_log_probabilities(teacher(ids[None]).logits, 5)
        rows.append({"input_ids": ids, "labels": ids, "teacher_logprobs": logprobs[0], "teacher_ids": tokens[0]})
    return rows


@pytest.mark.more
def test_a_packed_student_heals_under_folds(pool: RankPool, tmp_path: Path) -> None:
    both_forms(tmp_path, "qwen2_moe")
    rows = rows_of_teacher(tmp_path / "model")
    [(losses, _)] = pool.run(distilled.fit, str(tmp_path / "zeroed"), rows, "", 2, ranks=1)
    many = pool.run(distilled.fit, str(tmp_path / "packed"), rows, "| ep2", 2, epochs=6, ranks=2)[0][0]
    assert sum(many[-3:]) < sum(many[:3])  # three batches are an epoch
    assert not torch.allclose(ours(tmp_path / "packed"), ours(tmp_path / "model"))
    for fold in ("pp2 | ep2", "tp2 cp2 | ep4"):
        for other, _ in pool.run(distilled.fit, str(tmp_path / "packed"), rows, fold, 2, ranks=4):
            assert other == pytest.approx(losses, rel=1e-9)


@pytest.mark.slow  # a minute
def test_the_example(tmp_path: Path) -> None:
    sizes = ("--steps", "4", "--heal-steps", "2", "--rows", "4", "--length", "32", "--vocabulary", "300")
    output = tmp_path / "found.json"
    command = [sys.executable, "examples/heal.py", *sizes, "--seeds", "3", "--output", str(output)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(output.read_text())["3"]
    assert len(found) == 1 + 5 * 3
    assert all(math.isfinite(value) and value > 1 for pair in found.values() for value in pair)
    lines = [line.split() for line in done.stdout.splitlines() if line.endswith("of the size")]
    assert len(lines) == 15
    for ratio in ("20%", "40%", "60%"):
        shares = [float(line[-4].rstrip("%")) for line in lines if line[-8] == ratio]
        assert len(shares) == 5
        assert max(shares) - min(shares) < 0.5  # whole experts leave with their rows of the router
    assert "| CAMERA-P |" in done.stdout

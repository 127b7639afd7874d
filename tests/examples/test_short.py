# SPDX-License-Identifier: Apache-2.0
"""The short examples run on ranks, and learn."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from demo_data import read_python_topics, train_tokenizer
from lightning_moefold import MoECausalLM
from lightning_moefold.testing import make_checkpoint

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps", "first"), [("lora", 12, None), ("dpo", 8, 0.693)])
def test_an_example(name: str, steps: int, first: float | None, tmp_path: Path) -> None:
    said = _run(f"{name}.py", "--steps", steps, "--output", tmp_path)
    losses = [float(number) for number in re.findall(r"\d+\.\d{3}", said.splitlines()[-2])]
    assert losses[-1 if first is None else 0] < (first or losses[0])
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_distillation(tmp_path: Path) -> None:
    text = read_python_topics()[:6000]
    (tmp_path / "a.txt").write_text(text)
    teacher, student = (
        make_checkpoint(tmp_path / f"{seed}", "qwen2_moe", seed=seed, vocab_size=320) for seed in (1, 2)
    )
    train_tokenizer(text, 320).save_pretrained(teacher)
    words = [
        "--teacher",
        teacher,
        "--student",
        student,
        "--data",
        tmp_path / "a.txt",
        "--sequence-length",
        32,
        "--lr",
        0.01,
    ]
    said = _run("distill.py", *words, "--output", tmp_path / "out", "--devices", 2, "--fold", "| ep2")
    assert "the student is in" in said
    before, after = (
        dict(MoECausalLM.from_pretrained(p).named_parameters()) for p in (student, tmp_path / "out" / "model")
    )
    assert set(before) == set(after)
    assert not any(before[name].equal(after[name]) for name in before if name.endswith("gate.weight"))


def _run(script: str, *words: object) -> str:
    command = [sys.executable, ROOT / "examples" / script, *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout

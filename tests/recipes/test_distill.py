# SPDX-License-Identifier: Apache-2.0
"""A student of stored log-probabilities."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_moefold.models.batch import IGNORED
from lightning_moefold.recipes import InputError, distillation_loss, top_log_probabilities
from lightning_moefold.testing import RankPool, make_checkpoint
from tests.recipes import distilled
from tests.recipes.running import ROOT


def by_hand(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, k: int, weight: float, t: float
) -> float:
    """Loops over positions and tokens."""
    total = 0.0
    for row in range(len(labels)):
        for place in range(labels.shape[1] - 1):
            label = int(labels[row, place + 1])
            if label == IGNORED:
                continue
            q = torch.softmax(student[row, place], 0).tolist()
            p = torch.softmax(teacher[row, place], 0).tolist()
            kept = sorted(range(len(p)), key=lambda n: -p[n])[:k]
            p = [p[n] for n in kept] + [1 - sum(p[n] for n in kept)]
            mine = [q[n] for n in kept] + [1 - sum(q[n] for n in kept)]
            p, mine = ([x ** (1 / t) for x in both] for both in (p, mine))
            p, mine = ([x / sum(both) for x in both] for both in (p, mine))
            total += weight * t * t * sum(a * math.log(a / b) for a, b in zip(p, mine, strict=True))
            total -= (1 - weight) * math.log(q[label])
    return total


@pytest.mark.parametrize(("k", "weight", "temperature"), [(3, 1.0, 1.0), (10, 1.0, 1.0), (4, 0.6, 2.0), (2, 0.0, 1.0)])
def test_the_loss_is_its_formula(k, weight, temperature):
    draw = torch.Generator().manual_seed(k)
    student, teacher = (2 * torch.randn(2, 6, 11, generator=draw, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(11, (2, 6), generator=draw)
    labels[0, :3] = IGNORED
    top = torch.log_softmax(teacher, -1).topk(k)
    loss, count = distillation_loss(weight, temperature)(student, labels, top.values, top.indices)
    assert loss.item() == pytest.approx(by_hand(student, teacher, labels, k, weight, temperature), rel=1e-9)
    assert count == 3 + 5
    if k == 10 and weight == 1:  # all tokens but one: the divergence over the whole vocabulary
        whole = torch.nn.functional.kl_div(
            torch.log_softmax(student, -1), torch.log_softmax(teacher, -1), log_target=True, reduction="none"
        ).sum(-1)
        assert loss.item() == pytest.approx(whole[:, :-1][labels[:, 1:] != IGNORED].sum().item(), rel=1e-9)


def test_what_is_stored():
    logits = torch.randn(2, 3, 9)
    values, ids = top_log_probabilities(logits, 4)
    wanted = torch.log_softmax(logits, -1).sort(descending=True)
    assert torch.equal(values, wanted.values[..., :4])
    assert torch.equal(ids.long(), wanted.indices[..., :4])


def test_wrong_teachers():
    logits, labels = torch.randn(1, 4, 7), torch.ones(1, 4, dtype=torch.int64)
    loss_fn = distillation_loss()
    with pytest.raises(InputError, match="the teacher's token 8 is none of the model's 7; distil from a teacher"):
        loss_fn(logits, labels, torch.zeros(1, 4, 2), torch.full((1, 4, 2), 8))
    with pytest.raises(InputError, match="must have the rows and positions of the batch"):
        loss_fn(logits, labels, torch.zeros(1, 3, 2), torch.zeros(1, 3, 2, dtype=torch.int64))
    for wrong in ({"weight": 2}, {"temperature": 0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            distillation_loss(**wrong)
    with pytest.raises(InputError, match="from 1 to 6 can be stored, not 7"):
        top_log_probabilities(logits, 7)


@pytest.mark.more
def test_a_student_under_folds(pool: RankPool, tmp_path: Path):
    path = str(make_checkpoint(tmp_path / "student", "mixtral"))
    rows = distilled.make_rows(12, 96, 10, 5)
    [(losses, seen)] = pool.run(distilled.fit, path, rows, "", 2, ranks=1)
    assert sorted(seen) == list(range(12))
    [(many, _)] = pool.run(distilled.fit, path, rows, "", 2, epochs=6, ranks=1)
    assert sum(many[-3:]) < sum(many[:3])  # three batches are an epoch
    for fold in ("pp2 | ep2", "tp2 cp2 | ep4"):
        for other, _ in pool.run(distilled.fit, path, rows, fold, 2, ranks=4):
            assert other == pytest.approx(losses, rel=1e-9)


@pytest.mark.slow  # two ranks from scratch
def test_the_example(folder: Path, tmp_path: Path):
    student = make_checkpoint(tmp_path / "student", "mixtral", vocab_size=320)
    command = [
        sys.executable, "examples/distill.py", "--teacher", str(folder / "checkpoint"), "--student", str(student), "--data",
        str(folder / "a.txt"), "--output", str(tmp_path / "out"), "--devices", "2", "--fold", "tp2", "--sequence-length", "64",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"train/loss \d\.\d+; the student is in", done.stdout)
    assert list((tmp_path / "out" / "model").glob("*.safetensors"))

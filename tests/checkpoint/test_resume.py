# SPDX-License-Identifier: Apache-2.0
"""A resumed run is the run that was never interrupted, under the same fold and under any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_moefold.testing import RankPool, assert_close_by_name
from lightning_moefold.testing.pieces import assemble
from tests.checkpoint import jobs_resume
from tests.quick import quick
from tests.strategy.finetune import Report


def _whole(reports: list[Report], what: str) -> dict[str, Any]:
    return assemble(getattr(report, what) for report in reports)


def _compare(resumed: list[Report], full: list[Report], done: int, tolerance: float, what: str) -> None:
    losses = full[0].losses[done:]
    for report in resumed:
        assert report.losses == pytest.approx(losses, rel=max(tolerance, 1e-300)), what
        assert report.counters == full[0].counters, what
    for part in ("weights", "state"):
        assert_close_by_name(_whole(resumed, part), _whole(full, part), tolerance, f"{part}, {what}")


FOLDS = ["| etp2 ep2", "tp4 | ep2 etp2", "tp2 | ep4", "", "tp2 pp2 | ep2"]


@pytest.mark.parametrize(
    ("spec", "folds"),
    [
        ({}, ["| etp2 ep2", "tp2 pp2 | ep2"]),
        pytest.param({"optimizer": "sgd", "frozen": ["*.experts.*"]}, FOLDS, marks=pytest.mark.slow),
        pytest.param(
            {"frozen": ["*.mlp.gate.*", "model.layers.0.*"], "schedule": "step"}, FOLDS, marks=pytest.mark.more
        ),
    ],
    ids=["adamw", "sgd with frozen experts", "adamw with frozen layer"],
)
def test_resume(pool: RankPool, path: str, tmp_path: Path, spec: dict[str, Any], folds: list[str]) -> None:
    full = pool.run(jobs_resume.save_and_go_on, path, "tp2 | ep2", spec, str(tmp_path), ranks=2)
    # In the middle of an epoch, and at its end; the same fold computes the same bits.
    for step in (3, 5):
        checkpoint = str(tmp_path / f"step={step}.ckpt")
        resumed = pool.run(jobs_resume.resume, path, ["tp2 | ep2"], spec, checkpoint, ranks=2)
        _compare([r for [r] in resumed], full, step, 0.0, f"same fold after {step} steps")
    checkpoint = str(tmp_path / "step=3.ckpt")
    stored = [r for [r] in pool.run(jobs_resume.resume, path, ["tp2 | ep2"], spec, checkpoint, ranks=2)]
    for ranks, others in ((1, [""]), (4, folds)):
        outcome = pool.run(jobs_resume.resume, path, others, spec, checkpoint, ranks=ranks)
        for i, fold in enumerate(others):
            reports = [r[i] for r in outcome]
            for part in ("loaded", "loaded_state"):
                assert_close_by_name(_whole(reports, part), _whole(stored, part), 0.0, f"{part}, {fold!r} on {ranks}")
            _compare(reports, full, 3, 1e-9, f"{fold!r} on {ranks}")


@pytest.mark.more
@pytest.mark.parametrize(
    "spec",
    [pytest.param({}, marks=pytest.mark.slow), {"frozen": ["model.embed_tokens.*", "model.layers.0.*"]}],
    ids=["", "frozen stage"],
)
def test_resume_a_pipeline(pool: RankPool, path: str, tmp_path: Path, spec: dict[str, Any]) -> None:
    full = pool.run(jobs_resume.save_and_go_on, path, "pp2 | ep2", spec, str(tmp_path), ranks=4)
    checkpoint = str(tmp_path / "step=3.ckpt")
    stored = [r for [r] in pool.run(jobs_resume.resume, path, ["pp2 | ep2"], spec, checkpoint, ranks=4)]
    _compare(stored, full, 3, 0.0, "same fold")
    for ranks, folds in ((2, ["pp2", "tp2 | ep2"]), (4, ["tp2 pp2 | etp2"])):
        outcome = pool.run(jobs_resume.resume, path, folds, spec, checkpoint, ranks=ranks)
        for i, fold in enumerate(folds):
            reports = [r[i] for r in outcome]
            for part in ("loaded", "loaded_state"):
                assert_close_by_name(_whole(reports, part), _whole(stored, part), 0.0, f"{part}, {fold!r} on {ranks}")
            _compare(reports, full, 3, 1e-9, f"{fold!r} on {ranks}")


@pytest.mark.parametrize("where", quick(["data", "meta", "finish", "replace", "rename"], "data", "rename"))
def test_crash_while_saving(pool: RankPool, path: str, tmp_path: Path, where: str) -> None:
    """The error is raised on all ranks, the checkpoint that was there is whole, and nothing else is left."""
    for error, before, after in pool.run(jobs_resume.crash, path, "tp2 | ep2", str(tmp_path), where, ranks=2):
        assert "the disk is full" in error
        assert before == after
        assert "model.ckpt/meta.pt" in after

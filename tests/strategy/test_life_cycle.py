# SPDX-License-Identifier: Apache-2.0
"""Everything that a Trainer does besides training: entry points, callbacks, schedules, limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_moefold.testing import RankPool, assert_close_by_name, make_checkpoint
from lightning_moefold.testing.pieces import assemble
from tests.quick import quick
from tests.strategy import jobs_life_cycle

FOLD = "tp2 | ep2 etp2"
PIPELINE = "pp2 | ep2"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "qwen"
    return str(make_checkpoint(folder, "qwen2_moe", num_experts=4, vocab_size=96, moe_intermediate_size=8))


@pytest.mark.parametrize(
    ("fold", "early"),
    [
        (FOLD, False),
        pytest.param(FOLD, True, marks=pytest.mark.slow),
        pytest.param(PIPELINE, False, marks=pytest.mark.more),
    ],
    ids=["configure_model", "__init__", "pipeline"],
)
def test_entry_points(pool: RankPool, path: str, fold: str, early: bool) -> None:
    [expected] = pool.run(jobs_life_cycle.entry_points, path, "", False, ranks=1)
    actual = pool.run(jobs_life_cycle.entry_points, path, fold, early, ranks=4)
    for seen in actual:
        for key in ("validated", "tested", "validated again"):
            assert seen[key] == pytest.approx(expected[key], rel=1e-7), key  # Lightning logs in float32
            assert seen[key] == actual[0][key]
        assert seen["losses"] == pytest.approx(expected["losses"], rel=1e-9)
        assert seen["steps"] == expected["steps"] == 10
        assert seen["predicted"] == [torch.Size((4, 6))] * 2
        assert "make a new model" in seen["other precision"]
    for key in ("first", "weights"):
        assert_close_by_name(
            assemble(s[key] for s in actual), assemble(s[key] for s in expected and [expected]), 1e-8, key
        )


@pytest.mark.more
def test_model_outside_a_trainer(pool: RankPool, path: str) -> None:
    [losses] = pool.run(jobs_life_cycle.outside, path, ranks=1)
    actual = pool.run(jobs_life_cycle.cases, path, FOLD, [({}, {"max_epochs": 1})], ranks=4)
    assert actual[0][0].losses == pytest.approx(losses, rel=1e-9)


@pytest.mark.parametrize(
    ("fold", "weights_only"),
    quick([pytest.param(FOLD, False, marks=pytest.mark.slow), (FOLD, True), (PIPELINE, False)], (PIPELINE, False)),
)
@pytest.mark.more
def test_best_and_last(pool: RankPool, path: str, tmp_path: Path, fold: str, weights_only: bool) -> None:
    for seen in pool.run(jobs_life_cycle.keep_best, path, fold, str(tmp_path), weights_only, ranks=4):
        order = sorted(range(5), key=lambda step: -seen["losses"][step])
        kept = sorted(f"step={step + 1}.ckpt" for step in order[:2])
        assert seen["files"] == sorted(["last.ckpt", *kept])
        assert seen["last"] == seen["final"]
        if weights_only:
            assert "weights" in seen["error"]


RUNS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"schedule": "epoch", "train_rows": 20, "val_rows": 12}, {"max_epochs": 2, "accumulate_grad_batches": 2}),
    ({"schedule": "plateau"}, {"max_epochs": 3, "limit_train_batches": 2, "limit_val_batches": 1}),
    ({"patience": 1}, {"max_epochs": 6, "limit_train_batches": 1, "val_check_interval": 1}),
    ({}, {"fast_dev_run": 2}),
    ({}, {"max_steps": 3, "overfit_batches": 1, "max_epochs": -1}),
    ({"schedule": "step"}, {"max_steps": 7, "val_check_interval": 2, "num_sanity_val_steps": 0, "max_epochs": -1}),
]


@pytest.mark.parametrize("fold", [pytest.param(FOLD, marks=pytest.mark.slow), PIPELINE])
@pytest.mark.more
def test_limits_schedules_and_intervals(pool: RankPool, path: str, fold: str) -> None:
    [expected] = pool.run(jobs_life_cycle.cases, path, "", RUNS, ranks=1)
    actual = pool.run(jobs_life_cycle.cases, path, fold, RUNS, ranks=4)
    for i, (case, theirs) in enumerate(zip(RUNS, expected, strict=True)):
        reports = [runs[i] for runs in actual]
        for ours in reports:
            assert ours.losses == pytest.approx(theirs.losses, rel=1e-8), case
            assert ours.validation == pytest.approx(theirs.validation, rel=1e-8), case
            assert (ours.counters, ours.rates, ours.log) == (theirs.counters, theirs.rates, theirs.log), case
            assert ours.metrics == pytest.approx(theirs.metrics, rel=1e-6), case
            assert ours.metrics == reports[0].metrics, case
        assert_close_by_name(assemble(r.weights for r in reports), assemble([theirs.weights]), 1e-8, str(case))


@pytest.mark.more
def test_full_sharding_accumulates_in_pieces(pool: RankPool, path: str) -> None:
    """Gradients of each batch are scattered and added up, to the same weights."""
    [expected] = pool.run(jobs_life_cycle.accumulated, path, "", "optimizer", ranks=1)
    for sharding in ("full", "optimizer"):
        actual = pool.run(jobs_life_cycle.accumulated, path, "| ep2", sharding, ranks=4)
        assert actual[0].losses == pytest.approx(expected.losses, rel=1e-9)
        assert_close_by_name(assemble(r.weights for r in actual), assemble([expected.weights]), 1e-8, sharding)
        held = [missing == 0 for missing in actual[0].counters]
        assert held == [sharding == "full"] * 2


@pytest.mark.parametrize("peek", quick([False, True], True), ids=["", "forward before the step"])
@pytest.mark.more
def test_model_beside_own_modules(pool: RankPool, path: str, tmp_path: Path, peek: bool) -> None:
    """Aliases of parts of the model, running statistics and extra state survive saving under a fold."""
    (tmp_path / "1").mkdir()
    (tmp_path / "4").mkdir()
    [expected] = pool.run(jobs_life_cycle.composite, path, "", str(tmp_path / "1"), peek, ranks=1)
    actual = pool.run(jobs_life_cycle.composite, path, FOLD, str(tmp_path / "4"), peek, ranks=4)
    assert actual[0]["losses"] == pytest.approx(expected["losses"], rel=1e-9)
    whole = assemble(s["weights"] for s in actual)
    assert_close_by_name(whole, assemble([expected["weights"]]), 1e-8, "weights")
    assert_close_by_name(assemble(s["loaded"] for s in actual), whole, 0.0, "loaded weights")
    for seen in actual:
        assert_close_by_name(
            seen["own loaded"], actual[0]["own"], 0.0, "own parameters and buffers, as rank 0 has them"
        )
        assert seen["note"] == "written"


@pytest.mark.more
def test_hyperparameters_that_cannot_be_read_back(pool: RankPool, path: str, tmp_path: Path) -> None:
    for message in pool.run(jobs_life_cycle.callback_state, path, str(tmp_path), ranks=2):
        assert "torch.nn.modules.linear.Linear" in message
        assert "plain data" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_every_implementation_of_adamw(pool: RankPool, path: str, tmp_path: Path) -> None:
    actual = pool.run(jobs_life_cycle.kernels, path, "| ep2", str(tmp_path), ranks=4)
    whole = [assemble(runs[i].weights for runs in actual) for i in range(3)]
    for other in whole[1:]:
        assert_close_by_name(other, whole[0], 1e-10, "weights")


@pytest.mark.more
def test_predict(pool: RankPool, path: str) -> None:
    [expected] = pool.run(jobs_life_cycle.predict, path, "", 16, ranks=1)
    actual = pool.run(jobs_life_cycle.predict, path, "tp2 | ep4", 16, ranks=4)
    assert actual[0] == actual[1]
    assert actual[2] == actual[3]
    for batch, (even, odd) in zip(expected, zip(actual[0], actual[2], strict=True), strict=True):
        assert [batch[0::2], batch[1::2]] == [even, odd]

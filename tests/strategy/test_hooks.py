# SPDX-License-Identifier: Apache-2.0
"""Hooks on gradients do on one rank what they do without a strategy, and are refused where gradients are in parts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lightning_moefold.testing import RankPool, make_checkpoint
from tests.quick import quick
from tests.strategy import jobs_hooks


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("model") / "qwen", "qwen3_moe", num_experts=4))


@pytest.mark.parametrize("kind", quick(["hook", "post"], "post"))
@pytest.mark.more
def test_hooks_work_on_one_rank(pool: RankPool, path: str, kind: str) -> None:
    for when in ("configure_model", "on_train_start"):
        [(moved, _)] = pool.run(jobs_hooks.one_rank, path, kind, when, ranks=1)
        for name, rows in moved.items():
            if "embed_tokens" in name:
                assert set(rows) <= set(range(jobs_hooks.FIRST_ROW, 96)), (when, rows)
                assert rows, when
            else:
                assert rows == [jobs_hooks.EXPERT], (when, name, rows)
    [(moved, _)] = pool.run(jobs_hooks.one_rank, path, kind, "configure_model", True, ranks=1)
    assert any(min(rows) < jobs_hooks.FIRST_ROW for name, rows in moved.items() if "embed_tokens" in name), (
        "removed in vain"
    )


@pytest.mark.parametrize("kind", quick(["module", "pre"], "pre"))
def test_hooks_of_modules_work_on_one_rank(pool: RankPool, path: str, kind: str) -> None:
    [(_, calls)] = pool.run(jobs_hooks.one_rank, path, kind, "configure_model", ranks=1)
    assert calls == 3


@pytest.mark.parametrize(
    ("fold", "ranks", "precision"),
    quick([("tp2", 2, "64-true"), ("pp2", 2, "64-true"), ("", 1, "bf16-mixed")], ("tp2", 2, "64-true")),
)
def test_hooks_are_refused_where_gradients_are_in_parts(
    pool: RankPool, path: str, fold: str, ranks: int, precision: str
) -> None:
    for told in pool.run(jobs_hooks.refused, path, fold, {"precision": precision}, ranks=ranks):
        for case, (message, steps) in told.items():
            pattern = "HookError: WandbLogger.watch" if case.startswith("wandb") else "HookError: register_"
            # The process of rank zero alone is watched; the others hear of it.
            assert re.match(f"(PeerError: rank 0 failed: )?{pattern}", message), (case, message)
            assert "on_before_optimizer_step" in message
            assert "\n" not in message
            assert steps == 0, case


def test_loggers_that_upload_models(pool: RankPool, path: str, tmp_path: Path) -> None:
    [(message, steps, without)] = pool.run(jobs_hooks.loggers, path, str(tmp_path), ranks=1)
    assert "Uploading(log_model=True) uploads files, but checkpoints of this strategy are directories" in message
    assert steps == 0
    assert without == "no error"


def test_the_generator_of_a_shuffled_loader(pool: RankPool, path: str) -> None:
    [[said]] = pool.run(jobs_hooks.warned, path, True, ranks=1)
    assert "use_distributed_sampler=False" in said
    assert pool.run(jobs_hooks.warned, path, False, ranks=1) == [[]]

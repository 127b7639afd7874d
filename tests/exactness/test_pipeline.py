# SPDX-License-Identifier: Apache-2.0
"""What the matrix does not draw of pipelines (float64, errors below 1e-9)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_moefold import Fold
from lightning_moefold.testing import RankPool
from tests.exactness import compare, matrix
from tests.exactness.optimizers import groups_by_place
from tests.quick import quick

PLAIN: matrix.Row = {**matrix.PLAIN, "microbatches": 4, "schedule": "1f1b"}


@pytest.mark.slow
@pytest.mark.parametrize("schedule", matrix.FACTORS["schedule"])
def test_schedules(pool: RankPool, folder: Path, schedule: str) -> None:
    """Sharded weights, whose gathering a schedule can spoil from the second step on."""
    compare.check(pool, folder, Fold.parse("pp2 | ep2", 4), {**PLAIN, "schedule": schedule})


@pytest.mark.parametrize(
    "change",
    quick(
        [
            {"frozen": "last stage", "schedule": "gpipe"},
            {"frozen": "first stage", "schedule": "zbv"},
            {"shape": "6 experts, tied", "family": "mixtral", "schedule": "interleaved_1f1b", "accumulate": 2},
            {"split": [2, 1], "padding": "left", "uneven rows": True},
            {"split": [1, 2], "recompute": "full", "frozen": "router"},
            {"optimizer": groups_by_place, "frozen": "norm", "schedule": "gpipe"},
        ],
        {"frozen": "first stage", "schedule": "zbv"},
        {"split": [2, 1], "padding": "left", "uneven rows": True},
    ),
    ids=["frozen last stage", "frozen first stage", "tied", "split by hand", "recomputed", "empty groups"],
)
def test_special_stages(pool: RankPool, folder: Path, change: dict[str, Any]) -> None:
    compare.check(pool, folder, Fold.parse("pp2", 2), {**PLAIN, **change})


@pytest.mark.more
@pytest.mark.parametrize(("fold", "ranks"), [("tp2 pp2", 4), pytest.param("tp4 pp2 | ep2", 8, marks=pytest.mark.slow)])
def test_dualpipev_with_more_tensor_than_expert_ranks(pool: RankPool, folder: Path, fold: str, ranks: int) -> None:
    """Passes that take turns while the ranks of tp hold replicas of the same experts."""
    compare.check(pool, folder, Fold.parse(fold, ranks), {**PLAIN, "schedule": "dualpipev"})

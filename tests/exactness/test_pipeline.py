# SPDX-License-Identifier: Apache-2.0
"""Every pipeline schedule computes the training run of one process, under every fold (float64, errors below 1e-9)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_moefold import Fold
from lightning_moefold.parallel.stages import SPLIT_BACKWARD, V_SHAPED
from lightning_moefold.testing import RankPool
from tests.exactness import compare, cover
from tests.exactness.optimizers import groups_by_place
from tests.exactness.test_folds import _check

SCHEDULES = ["gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev"]
FACTORS = {
    **{name: values for name, values in compare.FACTORS.items() if name not in ("shape", "microbatches")},
    "shape": ["plain", "vocabulary of 97", "one key/value head", "dense layers", "28 heads"],
    "schedule": SCHEDULES,
    "microbatches": [1, 2, 4],
    "uneven rows": [False, True],
}
ROWS = cover.pairwise(FACTORS, seed=3)


def _folds(world: int) -> list[Fold]:
    return [f for f in Fold.enumerate(world) if f.pp > 1]


def fit(fold: Fold, row: dict[str, Any]) -> dict[str, Any]:
    """A row made legal for a fold: as many layers and micro-batches as its schedule needs."""
    schedule, pp = row["schedule"], fold.pp
    if schedule in V_SHAPED and row["shape"] == "one key/value head":  # its embeddings are tied
        schedule = "interleaved_zero_bubble"
    looped = schedule.startswith("interleaved")
    chunks = 2 if looped or schedule in V_SHAPED else 1
    least = {"1f1b": pp, "dualpipev": 2 * pp}.get(schedule, 1)
    microbatches = max(row["microbatches"], least)
    each = microbatches + 1 if row["uneven rows"] else max(microbatches, 16 // fold.dp)
    sharding = "optimizer" if schedule in SPLIT_BACKWARD and row["sharding"] == "full" else row["sharding"]
    return {
        **row,
        "pipeline": {"pipeline_schedule": schedule, "num_stages_per_rank": 2 if looped else 1},
        "layers": max(3, pp * chunks),
        "microbatches": microbatches,
        "rows": each * fold.dp,
        "sharding": sharding,
        "recompute": None if schedule in SPLIT_BACKWARD else row.get("recompute"),
    }


def _cases(folds: list[Fold], each: int, seed: int) -> list[Any]:
    rows = iter(cover.deal(ROWS, len(folds) * each, seed))
    return [pytest.param(fold, next(rows), id=f"{fold}-{i}") for fold in folds for i in range(each)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.mark.parametrize(("fold", "row"), _cases(_folds(2), 4, seed=1) + _cases(_folds(4), 1, seed=2))
def test_small_worlds(pool: RankPool, folder: Path, fold: Fold, row: dict[str, Any]) -> None:
    _check(pool, folder, fold, fit(fold, row))


EIGHT = [Fold.parse(text, 8) for text in ("tp2 pp2 | ep4", "tp2 cp2 pp2 | etp2")]


@pytest.mark.parametrize(("fold", "row"), _cases(EIGHT, 1, seed=3))
def test_eight_ranks(pool: RankPool, folder: Path, fold: Fold, row: dict[str, Any]) -> None:
    _check(pool, folder, fold, fit(fold, row))


PLAIN = {
    "family": "qwen2_moe", "shape": "plain", "accumulate": 1, "auxiliary": True, "microbatches": 4, "padding": "none",
    "ignore": "none", "frozen": (), "sharding": "optimizer", "optimizer": "adamw", "uneven rows": False,
}  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(pool: RankPool, folder: Path, schedule: str) -> None:
    """Sharded weights, whose gathering a schedule can spoil from the second step on."""
    fold = Fold.parse("pp2 | ep2", 4)
    compare.check(pool, folder, fold, fit(fold, {**PLAIN, "schedule": schedule}))


@pytest.mark.parametrize(
    "change",
    [
        {"frozen": ("model.embed_tokens.*", "model.layers.0.*", "model.layers.1.*")},  # the whole first stage
        {"frozen": ("model.layers.2.*", "model.norm.*", "lm_head.*"), "schedule": "gpipe"},  # the whole last one
        {"frozen": ("model.layers.2.*",), "schedule": "zbv"},
        {"shape": "one key/value head", "family": "mixtral", "schedule": "interleaved_1f1b", "accumulate": 2},
        {"pipeline_split": [2, 1], "padding": "left", "uneven rows": True},
        {"recompute": "full", "frozen": ("*.mlp.gate.weight",)},
        {"optimizer": groups_by_place, "frozen": ("model.norm.*",), "schedule": "gpipe"},
    ],
    ids=[
        "frozen first stage",
        "frozen last stage",
        "frozen stage within",
        "tied",
        "split by hand",
        "recomputed",
        "empty groups",
    ],
)
def test_special_stages(pool: RankPool, folder: Path, change: dict[str, Any]) -> None:
    fold = Fold.parse("pp2", 2)
    row = fit(fold, {**PLAIN, "schedule": "1f1b", **change})
    if "pipeline_split" in change:
        row["pipeline"]["pipeline_split"] = change["pipeline_split"]
    compare.check(pool, folder, fold, row)


@pytest.mark.slow
@pytest.mark.parametrize(("fold", "row"), _cases(_folds(8), 1, seed=4))
def test_all_folds_of_eight(pool: RankPool, folder: Path, fold: Fold, row: dict[str, Any]) -> None:
    _check(pool, folder, fold, fit(fold, row))


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
@pytest.mark.parametrize("fold", [Fold.parse("pp2 | ep2", 4), Fold.parse("tp2 pp2 | ep2", 4)], ids=str)
def test_all_rows_on_four(pool: RankPool, folder: Path, fold: Fold, row: dict[str, Any]) -> None:
    _check(pool, folder, fold, fit(fold, row))

# SPDX-License-Identifier: Apache-2.0
"""Every fold computes the training run that one process computes with Hugging Face's code (float64, errors below 1e-9)."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from lightning_moefold import Fold, FoldError, MoEConfig
from lightning_moefold.testing import RankPool
from tests.exactness import compare, cover

ROWS = cover.pairwise(compare.FACTORS)


def _folds(world: int) -> list[Fold]:
    return [f for f in Fold.enumerate(world) if f.pp == 1]


def _spread(folds: list[Fold]) -> list[Fold]:
    """Folds of 8 ranks in which every triple of axes meets in {1, > 1} as far as it can: a greedy cover."""
    axes = ("tp", "cp", "dp", "ep", "etp", "edp")

    def marks(fold: Fold) -> set[Any]:
        return {(t, tuple(fold.size(a) > 1 for a in t)) for t in itertools.combinations(axes, 3)}

    wanted = set().union(*(marks(f) for f in folds))
    chosen: list[Fold] = []
    while wanted:
        chosen.append(max(folds, key=lambda f: len(marks(f) & wanted)))
        wanted -= marks(chosen[-1])
    return chosen


def _legal(fold: Fold, row: dict[str, Any], folder: Path) -> bool:
    path = compare.checkpoint(folder, row["family"], row["shape"], row.get("layers"))
    try:
        fold.validate(MoEConfig.from_pretrained(path))
    except FoldError:
        return False
    return row["microbatches"] <= row.get("rows", compare.ROWS) // fold.dp


def _cases(folds: list[Fold], each: int, seed: int) -> list[Any]:
    rows = iter(cover.deal(ROWS, len(folds) * each, seed))
    return [pytest.param(fold, next(rows), id=f"{fold}-{i}") for fold in folds for i in range(each)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def _check(pool: RankPool, folder: Path, fold: Fold, row: dict[str, Any]) -> None:
    if _legal(fold, row, folder):
        compare.check(pool, folder, fold, row)
        return
    # An illegal fold must raise, and counts as a case.
    config = MoEConfig.from_pretrained(compare.checkpoint(folder, row["family"], row["shape"], row.get("layers")))
    with pytest.raises(FoldError, match="use "):
        fold.validate(config)
    compare.check(pool, folder, fold, {**row, "shape": "28 heads"})


@pytest.mark.parametrize(("fold", "row"), _cases(_folds(1) + _folds(2) + _folds(4), 1, seed=1))
def test_small_worlds(pool: RankPool, folder: Path, fold: Fold, row: dict[str, Any]) -> None:
    _check(pool, folder, fold, row)


@pytest.mark.parametrize(("fold", "row"), _cases(_spread(_folds(8)), 1, seed=2))
def test_eight_ranks(pool: RankPool, folder: Path, fold: Fold, row: dict[str, Any]) -> None:
    _check(pool, folder, fold, row)


@pytest.mark.slow
@pytest.mark.parametrize("family", compare.FACTORS["family"])
@pytest.mark.parametrize(("fold", "row"), _cases(_folds(8), 1, seed=3))
def test_all_folds_of_eight(pool: RankPool, folder: Path, fold: Fold, row: dict[str, Any], family: str) -> None:
    _check(pool, folder, fold, {**row, "family": family})


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
@pytest.mark.parametrize("fold", _folds(4), ids=str)
def test_all_rows_on_four(pool: RankPool, folder: Path, fold: Fold, row: dict[str, Any]) -> None:
    _check(pool, folder, fold, row)

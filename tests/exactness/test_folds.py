# SPDX-License-Identifier: Apache-2.0
"""Every fold computes the training run that one process computes with Hugging Face's code (float64, errors below 1e-9)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lightning_moefold import Fold
from lightning_moefold.testing import RankError, RankPool
from tests.exactness import compare, matrix, runs
from tests.exactness.shapes import checkpoint
from tests.quick import quick

CASES = [
    pytest.param(case, marks=pytest.mark.slow) if case.fold.world_size == 8 and case not in matrix.first() else case
    for case in matrix.everyday()
]


@pytest.mark.parametrize("case", quick(CASES, *matrix.first()), ids=str)
def test_folds(pool: RankPool, folder: Path, case: matrix.Case) -> None:
    compare.check(pool, folder, case.fold, case.row)


def test_a_fold_that_does_not_suit_the_model_never_starts(pool: RankPool, folder: Path) -> None:
    """Which folds these are is tested beside the matrix; here all ranks are told, and none hangs."""
    path = checkpoint(folder, "mixtral", "6 experts, tied")
    with pytest.raises(RankError) as caught:
        pool.run(runs.train, str(path), "tp2 | ep4", [[{}, {}]], {}, ranks=4)
    assert caught.value.exception_types == dict.fromkeys(range(4), "FoldError")
    assert all("use ep in 1,2,3,6" in message for message in caught.value.messages.values())


@pytest.mark.parametrize(
    ("fold", "dispatch"), quick([("pp2 | ep2", "alltoall"), ("pp2 | etp2", "allgather")], ("pp2 | etp2", "allgather"))
)
def test_padding_in_micro_batches_of_some_ranks_only(pool: RankPool, folder: Path, fold: str, dispatch: str) -> None:
    """Backward then asks for other tensors first; layers that run again do so at the same point on every rank."""
    row = {
        "family": "qwen3_moe", "shape": "6 experts, tied", "accumulate": 1, "auxiliary": True, "microbatches": 8,
        "uneven rows": True, "padding": "left", "documents": False, "ignore": "none", "frozen": "router",
        "sharding": "none", "optimizer": "adamw", "recompute": "full", "dispatch": dispatch, "exchange": None,
        "schedule": "1f1b",
    }  # fmt: skip
    compare.check(pool, folder, Fold.parse(fold, 4), row)


# ---- `make test-all`: errors and seconds of these are in the table at the end ----------------------------------------


@pytest.fixture(scope="module")
def sixteen() -> Iterator[RankPool]:
    with RankPool(16) as ranks:
        yield ranks


@pytest.mark.slow
@pytest.mark.parametrize("case", matrix.more_on_four(), ids=str)
def test_more_rows_on_four(
    pool: RankPool, folder: Path, case: matrix.Case, record_property: Callable[..., None]
) -> None:
    _check_for_the_table(pool, folder, case, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("case", matrix.all_of_eight(), ids=str)
def test_all_folds_of_eight(
    pool: RankPool, folder: Path, case: matrix.Case, record_property: Callable[..., None]
) -> None:
    _check_for_the_table(pool, folder, case, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("case", matrix.corners(), ids=str)
def test_every_schedule_with_every_exchange(
    pool: RankPool, folder: Path, case: matrix.Case, record_property: Callable[..., None]
) -> None:
    _check_for_the_table(pool, folder, case, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("case", matrix.sixteen(), ids=str)
def test_sixteen_ranks(
    sixteen: RankPool, folder: Path, case: matrix.Case, record_property: Callable[..., None]
) -> None:
    _check_for_the_table(sixteen, folder, case, record_property)


def _check_for_the_table(pool: RankPool, folder: Path, case: matrix.Case, record_property: Callable[..., None]) -> None:
    record_property("fold", str(case.fold))
    record_property("family", case.row["family"])
    record_property("error", compare.check(pool, folder, case.fold, case.row))

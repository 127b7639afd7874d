# SPDX-License-Identifier: Apache-2.0
"""Whatever is drawn, fold, model, routing, lengths and schedule together, the run is that of one process (errors < 1e-9)."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from lightning_moefold import Fold
from lightning_moefold.testing import RankPool, make_batches, make_checkpoint
from tests.exactness import compare, drawn, runs
from tests.quick import quick

#: A run takes seconds, so a failing draw is printed as it is. The same draws every time: a failure is not for one machine only.
common = settings(
    deadline=None, derandomize=True, print_blob=True, database=None, phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)  # fmt: skip


def _check(pool: RankPool, run: drawn.Run) -> None:
    fold = Fold.parse(run.fold, run.world)
    number = 2 * run.row["accumulate"]
    batches = compare.draw_batches(fold, run.row, number, run.model["vocab_size"], run.seed, run.length)
    with tempfile.TemporaryDirectory() as folder:
        path = run.write(Path(folder) / "model")
        compare.check_run(pool, path, fold, run.row, run.frozen, batches)


@settings(common, max_examples=2)
@given(run=drawn.runs((1, 2, 4)))
@pytest.mark.more
def test_a_few_runs_are_those_of_one_process(pool: RankPool, run: drawn.Run) -> None:
    _check(pool, run)


@pytest.mark.more
@settings(common, max_examples=10)
@given(run=drawn.runs((1, 2, 4)))
def test_a_run_is_that_of_one_process(pool: RankPool, run: drawn.Run) -> None:
    _check(pool, run)


@pytest.mark.slow
@settings(common, max_examples=150)
@given(run=drawn.runs((2, 4, 8)), salt=st.just("more"))
def test_many_runs_are_those_of_one_process(pool: RankPool, run: drawn.Run, salt: str) -> None:
    _check(pool, run)


@pytest.mark.parametrize("routing", quick(drawn.ROUTINGS, "one takes all", "some empty"))
def test_routings_are_what_their_names_say(pool: RankPool, tmp_path: Path, routing: str) -> None:
    path = make_checkpoint(tmp_path / "model", "mixtral", num_experts=6, hidden_size=24)
    drawn.skew(path, routing, 2)
    batches = make_batches(1, 1, 8, 12, 96)
    [run] = pool.run(runs.train, str(path), "", batches, {}, ranks=1)
    load_E, tokens = run.loads[0], 8 * 12
    assert int(load_E.sum()) == 2 * tokens
    if routing == "one takes all":
        assert int(load_E[0]) == tokens
    elif routing == "some empty":
        assert load_E[3:].tolist() == [0, 0, 0]
    else:
        assert int((load_E > 0).sum()) > 3

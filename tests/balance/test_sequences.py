# SPDX-License-Identifier: Apache-2.0
"""Any sequence of copies and moves, drawn by hypothesis, is the run of one process without them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from lightning_moefold import Fold
from lightning_moefold.balance.fast import ExpertCopies
from lightning_moefold.testing import RankPool, ReferenceRun, make_batches, make_checkpoint, reference_run
from tests.balance import plans
from tests.balance.moving import check_bits
from tests.exactness import compare, runs

#: Two optimizer steps after the first move: a state left behind shows in the weights.
STEPS = 3
#: Of two and four ranks: etp, edp, cp and pp above one, and more than one of them at once.
FOLDS = {2: ["| ep2", "tp2 | ep2", "cp2 | ep2"], 4: ["| ep2", "tp2 | ep2", "tp2 | ep2 etp2", "cp2 | ep2", "pp2 | ep2"]}
#: Three experts on a rank of ep: two of edp cut their stacks unevenly.
SIZES = {"num_experts": 6, "moe_intermediate_size": 14, "num_hidden_layers": 2, "vocab_size": 97}
OVERRIDES = {"output_router_logits": True}

Reference = Callable[[int, int, int, int], tuple[list[Any], ReferenceRun]]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("sequences") / "qwen", "qwen2_moe", **SIZES))


@pytest.fixture(scope="module")
def reference(path: str) -> Reference:
    @cache
    def run(dp: int, accumulate: int, num_microbatches: int, seed: int) -> tuple[list[Any], ReferenceRun]:
        batches = make_batches(STEPS * accumulate, dp, 4, 10, 97, seed=seed)
        common = {"accumulate": accumulate, "num_microbatches": num_microbatches, "clip": 0.5}
        return batches, reference_run(path, batches, config_overrides=OVERRIDES, **common)

    return run


@st.composite
def sequences(draw: st.DrawFn, ranks: int) -> dict[str, Any]:
    """A fold, which steps end with a move and where to, and how busy experts are copied in each pass."""
    fold = draw(st.sampled_from(FOLDS[ranks]))
    policies = [None, "greedy", "llep", "fastermoe_shadow", "joint", plans.drawn]
    return {
        "fold": fold,
        "copies": draw(st.sampled_from(policies)),
        "slots": draw(st.integers(1, 3)),
        "chunks": draw(st.sampled_from([1, 2])),
        "accumulate": draw(st.sampled_from([1, 2])),
        "sharding": draw(st.sampled_from(["optimizer", "full"])) if "pp" not in fold else "optimizer",
        "steps": draw(st.sets(st.integers(1, STEPS), min_size=1)),
        "seed": draw(st.integers(0, 99)),
        "renumber": draw(st.booleans()),
    }


def check(pool: RankPool, path: str, reference: Reference, ranks: int, drawn: dict[str, Any]) -> None:
    fold = Fold.parse(drawn["fold"], ranks)
    microbatches = 2 if fold.pp > 1 else 1
    batches, expected = reference(fold.dp, drawn["accumulate"], microbatches, drawn["seed"] % 3)
    copies = None if drawn["copies"] is None else ExpertCopies(drawn["copies"], drawn["slots"])
    spec = {
        "overrides": OVERRIDES, "clip": 0.5, "lr": 1e-2, "accumulate": drawn["accumulate"], "num_microbatches": microbatches,
        "sharding": drawn["sharding"], "dispatch": {"expert_copies": copies, "dispatch_chunks": drawn["chunks"]},
        "moves": {"seed": drawn["seed"], "renumber": drawn["renumber"], "steps": sorted(drawn["steps"])},
    }  # fmt: skip
    actual = pool.run(runs.train, path, drawn["fold"], batches, spec, ranks=ranks)
    compare.compare(actual, expected, 1e-9, drawn["fold"])
    for run in actual:
        assert len(run.moves) == len(drawn["steps"])
    for move in range(len(drawn["steps"])):
        before, after = ([run.moves[move][i] for run in actual] for i in (0, 1))
        assert check_bits(before, after) > 30


def _examples(number: int) -> settings:
    # No shrinking: each further example is a run of its own, and what failed is printed as it was drawn.
    return settings(max_examples=number, deadline=None, derandomize=True, database=None, phases=[Phase.generate])


@pytest.mark.more
@_examples(6)
@given(drawn=sequences(2))
def test_two_ranks(pool: RankPool, path: str, reference: Reference, drawn: dict[str, Any]) -> None:
    check(pool, path, reference, 2, drawn)


@pytest.mark.slow
@_examples(40)
@given(drawn=sequences(4))
def test_four_ranks(pool: RankPool, path: str, reference: Reference, drawn: dict[str, Any]) -> None:
    check(pool, path, reference, 4, drawn)

# SPDX-License-Identifier: Apache-2.0
"""What the test matrix claims to cover, checked without running it."""

from __future__ import annotations

import itertools

import pytest

from lightning_moefold import Fold, FoldError
from tests.exactness import matrix
from tests.exactness.shapes import SHAPES

#: What cannot meet, and why. Everything else must.
FORBIDDEN: list[tuple[str, object, str, object]] = [
    # Both ends of a V-shaped pipeline are on one rank, and the embeddings are on both ends.
    ("shape", "6 experts, tied", "schedule", "zbv"),
    ("shape", "6 experts, tied", "schedule", "dualpipev"),
    # The head of the last stage is the embedding of the first.
    ("shape", "6 experts, tied", "frozen", "last stage"),
    # One key/value head is not cut over cp.
    ("shape", "6 experts, tied", "exchange", "all_to_all"),
    # Pipelines that need as many micro-batches as ranks, or twice as many.
    ("microbatches", 1, "schedule", "1f1b"),
    ("microbatches", 1, "schedule", "dualpipev"),
    ("microbatches", 2, "schedule", "dualpipev"),
    # Backward in two parts.
    *(
        (name, value, "schedule", schedule)
        for schedule in ("interleaved_zero_bubble", "zbv", "dualpipev")
        for name, value in (("sharding", "full"), *(("recompute", r) for r in matrix.FACTORS["recompute"] if r))
    ),
    *(("exchange", exchange, "cp", False) for exchange in matrix.FACTORS["exchange"]),
    *(("schedule", schedule, "pp", False) for schedule in matrix.FACTORS["schedule"]),
]


def test_every_fold_of_four_ranks_and_some_of_eight() -> None:
    folds = {case.fold for case in matrix.everyday()}
    assert {f for f in folds if f.world_size == 4} == set(Fold.enumerate(4))
    assert len(set(Fold.enumerate(4))) == 46
    assert {f for f in folds if f.world_size <= 2} == {*Fold.enumerate(1), *Fold.enumerate(2)}
    assert len([f for f in folds if f.world_size == 8]) == 18


def test_every_triple_of_axes_on_eight_ranks() -> None:
    """Each three axes in each combination of 1 and more: all eight combinations can be had."""
    found = {
        (axes, kinds)
        for case in matrix.everyday()
        if case.fold.world_size == 8
        for axes in itertools.combinations(("tp", "cp", "dp", "pp", "ep", "etp", "edp"), 3)
        for kinds in [tuple(case.fold.coordinates(7)[axis] > 0 for axis in axes)]  # the last rank is last on every axis
    }
    assert len(found) == 35 * 8


def test_any_two_values_meet() -> None:
    """Of two factors, and of a factor and an axis that is 1 or more."""
    met = set().union(*(matrix.pairs(case.fold, case.row) for case in matrix.everyday()))
    wanted = set(matrix.wanted_pairs())
    forbidden = {((a, x), (b, y)) for a, x, b, y in FORBIDDEN}
    assert forbidden <= wanted
    assert met & forbidden == set()
    assert wanted - forbidden - met == set()


def test_a_few_cases_show_every_kind_once() -> None:
    """What ``make test`` leaves to ``make test-more`` shows features together that are seen one by one or in other company."""
    first = matrix.first()
    assert set(first) <= set(matrix.everyday())
    assert len(first) < 20
    met = set().union(*map(matrix.kinds, first))
    assert met == set().union(*map(matrix.kinds, matrix.everyday()))
    assert {(name, value) for name, values in matrix.FACTORS.items() for value in values} <= met
    assert {(axis,) for axis in matrix.AXES} <= met
    assert {("dispatch", way, "ep") for way in matrix.FACTORS["dispatch"]} <= met
    assert {("dispatch", way, "etp") for way in matrix.FACTORS["dispatch"]} <= met
    together = {pair for pair in met if pair[0] in matrix.AXES and len(pair) == 2}
    assert together == set(itertools.combinations(matrix.AXES, 2))


@pytest.mark.parametrize(
    "suite", [matrix.everyday, matrix.more_on_four, matrix.all_of_eight, matrix.corners, matrix.sixteen]
)
def test_every_case_is_legal_and_named_once(suite) -> None:  # type: ignore[no-untyped-def]
    cases = suite()
    assert len({str(case) for case in cases}) == len(cases)
    for case in cases:
        assert matrix.why_not(case.fold, case.row) is None
        assert set(case.row) == set(matrix.FACTORS)


def test_the_long_suites() -> None:
    eight = {(case.fold, case.row["family"]) for case in matrix.all_of_eight()}
    assert eight == set(itertools.product(Fold.enumerate(8), matrix.FACTORS["family"]))
    assert len(eight) == 146 * 3
    met = {(c.fold, c.row["schedule"], c.row["exchange"]) for c in matrix.corners()}
    assert len(met) == 6 * 6 * 3
    first = matrix.sixteen()[0].fold
    assert str(first) == "tp2 cp2 dp2 pp2 | etp2 ep2 edp2"
    assert len({case.fold for case in matrix.sixteen()}) == 10


def test_folds_that_do_not_suit_a_shape_are_refused() -> None:
    """Each combination of a fold of eight ranks, a family and a shape is legal, or refused with a way out, by these rules."""
    refused = 0
    for fold, family, shape in itertools.product(Fold.enumerate(8), matrix.FACTORS["family"], SHAPES):
        config = matrix.config_of(family, shape, 8)
        widths = [(w, fold.tp) for w in config.dense_widths.values()]
        widths += [(w, fold.etp) for w in config.expert_widths.values()]
        legal = config.num_experts % fold.ep == 0 and config.num_attention_heads >= fold.tp
        if legal and all(width % size == 0 for width, size in widths):
            fold.validate(config)
        else:
            refused += 1
            with pytest.raises(FoldError, match=r"use (ep|tp|etp)( in|) "):
                fold.validate(config)
    assert refused > 100

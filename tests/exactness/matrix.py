# SPDX-License-Identifier: Apache-2.0
"""The test matrix: which folds are tried, and which values of the other factors meet in each. Pure Python, the same every time.

Every fold comes with a row, that is, one value of each factor. Rows are chosen greedily so that any two values of two factors,
and any value with any axis of the fold in {1, > 1}, meet in some case of the suite, as far as the rules let them. Only
schedules and exchanges do not all meet there: their full product is among the slow tests.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from lightning_moefold import Fold, FoldError, MoEConfig
from lightning_moefold.parallel.pipeline.plan import SCHEDULES, PipelinePlan
from tests.exactness.shapes import SHAPES, hf_config

AXES = ("tp", "cp", "dp", "pp", "ep", "etp", "edp")

#: Rows of the global batch, whatever the number of data ranks, where these are enough.
GLOBAL_ROWS = 8

FACTORS: dict[str, list[Any]] = {
    "family": ["mixtral", "qwen2_moe", "qwen3_moe"],
    "shape": list(SHAPES),
    "accumulate": [1, 2],
    "auxiliary": [True, False],
    "microbatches": [1, 2, 4],
    "uneven rows": [False, True],  # the rows of a rank do not divide by the number of micro-batches
    "padding": ["none", "right", "left"],
    "documents": [False, True],
    "ignore": ["none", "uneven", "one_rank_empty"],
    "frozen": ["nothing", "router", "experts", "first stage", "last stage"],
    "sharding": ["optimizer", "full", "none"],
    "optimizer": ["adamw", "sgd"],
    "recompute": [None, "selective", "full", ("norm", "expert_activation"), ("norm", "moe")],
    "dispatch": ["alltoall", "allgather", "deduplicated", "chunks"],
    "moves": [False, True],  # experts change places at random after every step
    "exchange": ["ring", "all_gather", "all_to_all"],  # cp > 1 only
    "schedule": list(SCHEDULES),  # pp > 1 only
}

Row = dict[str, Any]
#: Nothing special, for cases beside the matrix.
PLAIN: Row = {
    "family": "qwen2_moe", "shape": "28 heads", "accumulate": 1, "auxiliary": True, "microbatches": 1, "uneven rows": False,
    "padding": "none", "documents": False, "ignore": "none", "frozen": "nothing", "sharding": "optimizer",
    "optimizer": "adamw", "recompute": None, "dispatch": "alltoall", "moves": False, "exchange": None, "schedule": None,
}  # fmt: skip
#: A pair of marks: two factors with their values, or a factor with its value and an axis with its kind.
Pair = tuple[tuple[str, Any], tuple[str, Any]]


@dataclass(frozen=True)
class Case:
    """A fold, and a value of every factor."""

    fold: Fold
    values: tuple[tuple[str, Any], ...]
    label: str = ""

    @property
    def row(self) -> Row:
        return dict(self.values)

    def __str__(self) -> str:
        return f"{self.fold}-{self.label}"


# ---- which rows suit a fold ------------------------------------------------------------------------------------------


def plan(row: Row) -> PipelinePlan:
    """The pipeline of a row."""
    looped = row["schedule"].startswith("interleaved")
    return PipelinePlan(row["schedule"], 2 if looped or row["schedule"] in ("zbv", "dualpipev") else 1)


def layers(fold: Fold, row: Row) -> int:
    """As few layers as the family, the shape and the stages allow."""
    least = 3 if row["family"] == "qwen3_moe" or row["shape"] == "dense layers" else 2
    return least if fold.pp == 1 else max(3, fold.pp * plan(row).chunks)


@cache
def config_of(family: str, shape: str, num_layers: int) -> MoEConfig:
    """The configuration without a checkpoint on disk."""
    return MoEConfig.from_hf(hf_config(family, shape, num_hidden_layers=num_layers))


def why_not(fold: Fold, row: Row) -> str | None:
    """Why a row does not suit a fold; None if it does. What the package refuses is asked of the package itself."""
    if (row["exchange"] is None) != (fold.cp == 1) or (row["schedule"] is None) != (fold.pp == 1):
        return "an exchange belongs to cp > 1, a schedule to pp > 1"
    config = config_of(row["family"], row["shape"], layers(fold, row))
    try:
        fold.validate(config)
        if fold.pp > 1:
            plan(row).check(fold.pp, row["microbatches"], row["sharding"], row["recompute"])
    except (FoldError, ValueError) as error:
        return str(error)
    heads = (config.num_attention_heads, config.num_key_value_heads)
    if row["exchange"] == "all_to_all" and any(n % (fold.tp * fold.cp) for n in heads):
        return "all-to-all cuts the heads of a tp rank over cp"
    tied = config.tie_word_embeddings
    if tied and (row["schedule"] in ("zbv", "dualpipev") or row["frozen"] == "last stage"):
        return "tied embeddings do not go with one rank for both ends; and belong to the first stage, too"
    return None


def frozen_patterns(fold: Fold, row: Row) -> tuple[str, ...]:
    """Names of what is frozen; where there are no stages, the first or last layer with the end of the model beside it."""
    kind = row["frozen"]
    if kind.endswith("stage"):
        number = layers(fold, row)
        stages = [range(1), range(number - 1, number)]
        if fold.pp > 1:
            stages = plan(row).layers(config_of(row["family"], row["shape"], number), fold.pp)
        first = kind == "first stage"
        names = [f"model.layers.{i}.*" for i in stages[0 if first else -1]]
        return (*names, "model.embed_tokens.*") if first else (*names, "model.norm.*", "lm_head.*")
    return {"nothing": (), "norm": ("model.norm.*",), "router": ("*.mlp.gate.weight",), "experts": ("*.experts.*",)}[
        kind
    ]


def rows_per_rank(fold: Fold, row: Row) -> int:
    """Of a mini-batch: enough for the micro-batches, and one more where they are to be uneven."""
    each = row["microbatches"] + 1 if row["uneven rows"] else row["microbatches"]
    return each if row["uneven rows"] and row["microbatches"] > 1 else max(each, GLOBAL_ROWS // fold.dp)


# ---- which folds -----------------------------------------------------------------------------------------------------


def combinations_of_axes(fold: Fold, strength: int) -> set[Any]:
    """Every ``strength`` axes of a fold, each as 1 or more than 1."""
    return {(axes, tuple(fold.size(a) > 1 for a in axes)) for axes in itertools.combinations(AXES, strength)}


def covering_folds(folds: Sequence[Fold], count: int) -> list[Fold]:
    """Folds that show every triple of axes in {1, > 1} that any of ``folds`` has; up to ``count``, as many quadruples as can be."""
    chosen: list[Fold] = []
    for strength in (3, 4):
        of = {fold: combinations_of_axes(fold, strength) for fold in folds}
        missing = set().union(*of.values()).difference(*(of[fold] for fold in chosen))
        while missing and (strength == 3 or len(chosen) < count):
            chosen.append(max(folds, key=lambda fold: len(of[fold] & missing)))
            missing -= of[chosen[-1]]
    return chosen


# ---- which rows meet which folds -------------------------------------------------------------------------------------


def pairs(fold: Fold, row: Row) -> set[Pair]:
    """Everything that meets in a case, two by two; axes with factors, but not with each other."""
    values = [(name, value) for name, value in row.items() if value is not None or name == "recompute"]
    kinds = [(axis, fold.size(axis) > 1) for axis in AXES]
    return {*itertools.combinations(values, 2), *itertools.product(values, kinds)}


def draw(fold: Fold, chance: random.Random, fixed: Row | None = None) -> Row | None:
    """A random row that suits a fold and has the fixed values; None if none is found soon."""
    for _ in range(40):
        row = {name: chance.choice(values) for name, values in FACTORS.items()}
        row["exchange"] = row["exchange"] if fold.cp > 1 else None
        row["schedule"] = row["schedule"] if fold.pp > 1 else None
        if fold.pp > 1 and row["microbatches"] < fold.pp:  # pipelines need many
            row["microbatches"] = chance.choice([row["microbatches"], fold.pp, 2 * fold.pp])
        row |= fixed or {}
        if why_not(fold, row) is None:
            return row
    return None


def cover(folds: Iterable[Fold], more_on: Sequence[Fold], seed: int, candidates: int = 40) -> list[Case]:
    """A case for every fold, then more on ``more_on`` until every pair that can be met is.

    Args:
        folds: Each gets one case.
        more_on: Folds on which a pair left over is tried, cheap ones first.
        seed: Of the draws.
        candidates: Rows drawn for a case, of which the one that meets most new pairs is taken.
    """
    chance = random.Random(seed)
    met: set[Pair] = set()
    cases: list[Case] = []

    def take(fold: Fold, fixed: Row | None = None) -> bool:
        drawn = [row for row in (draw(fold, chance, fixed) for _ in range(candidates)) if row is not None]
        if not drawn:
            return False
        best = max(drawn, key=lambda row: sum(_weight(pair) for pair in pairs(fold, row) - met))
        met.update(pairs(fold, best))
        cases.append(Case(fold, tuple(best.items()), str(sum(case.fold == fold for case in cases))))
        return True

    for fold in folds:
        if not take(fold):
            raise AssertionError(f"no row suits {fold}")
    for a, b in wanted_pairs():
        if (a, b) not in met:
            axes = {name: big for name, big in (a, b) if name in AXES}
            fixed = {name: value for name, value in (a, b) if name not in AXES}
            suited = (f for f in more_on if all((f.size(axis) > 1) == big for axis, big in axes.items()))
            any(draw(fold, chance, fixed) and take(fold, fixed) for fold in suited)
    return cases


def _weight(pair: Pair) -> int:
    """Few folds have a schedule or an exchange, so they must not waste their cases."""
    return 1 + 6 * sum(name in ("schedule", "exchange") for name, _ in pair)


def wanted_pairs() -> Iterator[Pair]:
    """Every pair of values of two factors, and every value with every axis in {1, > 1}, whether or not it can be met.

    Except pairs of an exchange and a schedule.
    """
    for (a, many), (b, others) in itertools.combinations(FACTORS.items(), 2):
        if (a, b) != ("exchange", "schedule"):  # see corners()
            yield from (((a, x), (b, y)) for x, y in itertools.product(many, others))
    for (name, many), axis, big in itertools.product(FACTORS.items(), AXES, (False, True)):
        for value in many:
            yield (name, value), (axis, big)


# ---- the suites ------------------------------------------------------------------------------------------------------

FOUR = list(Fold.enumerate(4))
EIGHT = list(Fold.enumerate(8))
#: Where the schedules and the exchanges meet in full.
CORNERS = [
    Fold.parse(text, 8)
    for text in ("tp2 cp2 pp2 | etp2", "tp2 cp2 pp2 | ep4", "cp2 pp2 | ep2", "cp2 pp2 | etp2 ep2", "cp4 pp2 | ep2", "cp2 pp4 | ep2")
]  # fmt: skip


@cache
def everyday() -> tuple[Case, ...]:
    """Every fold of up to four ranks, and a cover of those of eight, of which ``make test-all`` runs most."""
    few = [*Fold.enumerate(1), *Fold.enumerate(2)]
    return tuple(cover([*few, *FOUR, *covering_folds(EIGHT, 18)], [*few, *(f for f in FOUR if f.pp == 2)], seed=6))


def kinds(case: Case) -> set[Any]:
    """The kinds of features in a case: values of factors, axes > 1 two by two, and dispatchers with the axes of experts."""
    large = [axis for axis in AXES if case.fold.size(axis) > 1]
    values = {(name, value) for name, value in case.values if value in FACTORS[name]}
    experts = {("dispatch", case.row["dispatch"], axis) for axis in large if axis in ("ep", "etp", "edp")}
    return values | experts | {(axis,) for axis in large} | set(itertools.combinations(large, 2))


@cache
def first() -> tuple[Case, ...]:
    """What ``make test`` runs of :func:`everyday`: every kind of feature once, on few ranks, and one case of eight ranks."""
    chosen = [max((case for case in everyday() if case.fold.world_size == 8), key=lambda case: len(kinds(case)))]
    missing = set().union(*map(kinds, everyday())) - kinds(chosen[0])
    while missing:
        chosen.append(max(everyday(), key=lambda case: len(kinds(case) & missing) / case.fold.world_size))
        missing -= kinds(chosen[-1])
    return tuple(chosen)


def more_on_four() -> list[Case]:
    """Every fold of four ranks with rows of chance beside the covering ones."""
    chance = random.Random(5)
    drawn = [(fold, number, draw(fold, chance)) for fold in FOUR for number in range(4)]
    return [Case(fold, tuple(row.items()), f"more{number}") for fold, number, row in drawn if row is not None]


@cache
def all_of_eight() -> tuple[Case, ...]:
    """Every fold of eight ranks with every family."""
    chance = random.Random(2)
    cases = []
    for fold, family in itertools.product(EIGHT, FACTORS["family"]):
        row = draw(fold, chance, {"family": family})
        assert row is not None, f"no row suits {fold} with {family}"
        cases.append(Case(fold, tuple(row.items()), family))
    return tuple(cases)


def corners() -> list[Case]:
    """Every schedule with every exchange on some folds that cut rows and layers."""
    chance = random.Random(3)
    cases = []
    for fold, schedule, exchange in itertools.product(CORNERS, FACTORS["schedule"], FACTORS["exchange"]):
        fixed: Row = {"schedule": schedule, "exchange": exchange, "shape": "28 heads", "microbatches": 2 * fold.pp}
        row = draw(fold, chance, fixed)
        assert row is not None, f"no row suits {fold} with {schedule} and {exchange}"
        cases.append(Case(fold, tuple(row.items()), f"{schedule}-{exchange}"))
    return cases


def sixteen() -> list[Case]:
    """Every mapping of the experts beside tp2 cp2 dp2 pp2; the first has every axis greater than one."""
    folds = [f for f in Fold.enumerate(16) if (f.tp, f.cp, f.pp) == (2, 2, 2)]
    folds.sort(key=lambda f: f.size("etp") * f.size("ep") != 4 or f.etp != 2)
    chance = random.Random(4)
    cases = []
    for fold in folds:
        row = draw(fold, chance, {"accumulate": 1})
        assert row is not None, f"no row suits {fold}"
        cases.append(Case(fold, tuple(row.items()), row["family"]))
    return cases

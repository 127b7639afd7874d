# SPDX-License-Identifier: Apache-2.0
"""Which rows a plan sends where, without ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_moefold import Fold
from lightning_moefold.balance.copies import CopyPlan, Counts, RowSplit, no_copies, owners
from lightning_moefold.balance.costs import BalanceCosts
from lightning_moefold.balance.fast import FAST_POLICIES, CopyCounter, ExpertCopies
from lightning_moefold.balance.greedy import greedy
from lightning_moefold.balance.policies import POLICIES
from lightning_moefold.balance.policies.base import CopiesFrom
from lightning_moefold.dispatch import DispatchConfig, settle
from lightning_moefold.dispatch.copied import travel_of
from lightning_moefold.errors import InputError
from tests.balance import plans

SIZES = st.tuples(st.integers(1, 4), st.integers(1, 2), st.integers(1, 3), st.integers(0, 3), st.integers(0, 10_000))


def _counts(ranks: int, peers: int, local: int, seed: int) -> Counts:
    """Skewed, with empty experts and empty sources among them."""
    chance = np.random.default_rng(seed)
    rows = chance.integers(0, 9, (ranks * peers, ranks * local)) * chance.integers(0, 2, (1, ranks * local))
    return rows * chance.integers(0, 2, (ranks * peers, 1)) + (chance.random(rows.shape) < 0.2)


def _one_by_one(counts_SE: Counts, quota_RE: Counts) -> Counts:
    """The rule of the module, row by row."""
    sources, ranks = len(counts_SE), len(quota_RE)
    rows_SRE = np.zeros((sources, *quota_RE.shape), dtype=np.int64)
    room_RE = quota_RE.copy()
    left_SE = counts_SE.copy()
    for own in (True, False):
        for expert in range(counts_SE.shape[1]):
            for source in range(sources):
                for rank in range(ranks):
                    while (
                        (not own or source // (sources // ranks) == rank)
                        and left_SE[source, expert]
                        and room_RE[rank, expert]
                    ):
                        left_SE[source, expert] -= 1
                        room_RE[rank, expert] -= 1
                        rows_SRE[source, rank, expert] += 1
    return rows_SRE  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(SIZES)
def test_rows_of_a_plan(sizes: tuple[int, ...]) -> None:
    ranks, peers, local, most, seed = sizes
    counts_SE = _counts(ranks, peers, local, seed)
    counts_RE = counts_SE.reshape(ranks, peers, -1).sum(1)
    quota_RE = plans.drawn(counts_RE, owners(counts_SE.shape[1], ranks), None, most)
    plan = CopyPlan(quota_RE)
    plan.check(counts_RE, most, "drawn")
    rows_SRE = plans.rows_of_plan(counts_SE, quota_RE)
    assert (rows_SRE == _one_by_one(counts_SE, quota_RE)).all()
    assert (rows_SRE.sum(1) == counts_SE).all()
    assert (rows_SRE.sum(0) == quota_RE).all()
    split = RowSplit(counts_SE, plan)
    assert all((split.received(rank) == rows_SRE[:, rank]).all() for rank in range(ranks))
    for rank in range(ranks):  # what is lent is what is borrowed, in the same order
        lent = [(owner, owner * local + e) for owner in range(ranks) for e in plan.lent(owner)[rank]]
        assert [expert for _, expert in lent] == plan.borrowed(rank)
        assert len(lent) <= most


@settings(max_examples=40, deadline=None)
@given(SIZES, st.integers(1, 3))
def test_travel(sizes: tuple[int, ...], chunks: int) -> None:
    """What a rank sends is what the other receives, part by part, and every row of an expert is sent once."""
    ranks, peers, local, most, seed = sizes
    counts_SE = _counts(ranks, peers, local, seed)
    counts_RE = counts_SE.reshape(ranks, peers, -1).sum(1)
    plan = CopyPlan(plans.drawn(counts_RE, owners(ranks * local, ranks), None, most))
    cut = [len(part) for part in np.array_split(range(local), min(chunks, local))]
    found = [[travel_of(counts_SE, plan, cut, rank, peer) for peer in range(peers)] for rank in range(ranks)]
    rows_SRE = plans.rows_of_plan(counts_SE, plan.quota_RE)
    for rank, peer in np.ndindex(ranks, peers):
        travel = found[rank][peer]
        assert len(travel.parts) == len(cut) + (plan.copies > 0)
        taken = [
            row
            for start, rows in zip(travel.starts_B, travel.rows_B, strict=True)
            for row in range(start, start + rows)
        ]
        assert sorted(taken) == list(range(counts_SE[rank * peers + peer].sum()))
        assert sum(map(sum, (part.send for part in travel.parts))) == len(taken)
        for number, part in enumerate(travel.parts):
            assert part.send == [found[other][peer].parts[number].receive[rank] for other in range(ranks)]
            assert part.arrived == [sum(found[rank][other].parts[number].receive) for other in range(peers)]
        experts = [*range(rank * local, (rank + 1) * local), *plan.borrowed(rank)]
        computed = np.concatenate([part.counts_PSX for part in travel.parts], 2)
        wanted = rows_SRE[:, rank].reshape(ranks, peers, -1)[:, :, experts].transpose(1, 0, 2)
        assert (computed == wanted).all()
    # fmt: skip


def test_own_rows_do_not_travel() -> None:
    counts_SE = np.array([[10, 0], [10, 0]])
    rows_SRE = plans.rows_of_plan(counts_SE, np.array([[10, 0], [10, 0]]))
    assert rows_SRE[:, :, 0].tolist() == [[10, 0], [0, 10]]


def test_greedy_evens_out_what_copies_allow() -> None:
    counts_SE = np.full((4, 8), 5)
    counts_SE[:, 3] = 1000
    quota_RE = greedy(counts_SE, owners(8, 4), None, 1)  # one hot expert needs one copy on each other rank
    assert quota_RE.sum(1).tolist() == [1035] * 4
    assert CopyPlan(quota_RE).copied_RE.sum(1).tolist() == [1, 0, 1, 1]
    empty = np.zeros((4, 8), dtype=np.int64)
    assert not CopyPlan(greedy(empty, owners(8, 4), None, 2)).copies


@settings(max_examples=60, deadline=None)
@given(SIZES)
def test_greedy_plans_what_can_be(sizes: tuple[int, ...]) -> None:
    ranks, _, local, most, seed = sizes
    counts_SE = _counts(ranks, 1, local, seed)
    plan = CopyPlan(greedy(counts_SE, owners(ranks * local, ranks), None, most))
    plan.check(counts_SE, most, "greedy")
    assert plan.quota_RE.sum(1).max() <= no_copies(counts_SE, ranks).sum(1).max()


def test_what_is_counted() -> None:
    counts_SE = np.array([[30, 1, 1, 0], [30, 1, 1, 0]])
    counter = CopyCounter()
    plan = ExpertCopies("greedy", max_copies_per_rank=1).plan(counts_SE, 2)
    counter.count(plan, 10)
    assert (counter.passes, counter.copies, counter.rows, counter.bytes) == (1, 1, 30, 10)
    assert (counter.busiest_home, counter.busiest, counter.mean) == (62, 32, 32.0)


def _lose(counts_SE: Counts, *_: object) -> Counts:
    quota_RE = no_copies(counts_SE, len(counts_SE))
    quota_RE[0, 0] -= 1
    return quota_RE


def _too_many(counts_SE: Counts, *_: object) -> Counts:
    quota_RE = no_copies(counts_SE, len(counts_SE))
    quota_RE[1] += quota_RE[0]
    quota_RE[0] = 0
    return quota_RE


def _narrow(counts_SE: Counts, *_: object) -> Counts:
    return no_copies(counts_SE, len(counts_SE))[:, :2]


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (_lose, r"the policy of copies '_lose' plans \[5, 0\] rows of expert 0 for the ranks, and there are 6; a plan"),
        (_too_many, "'_too_many' plans 2 copies on one rank, and max_copies_per_rank is 1"),
        (_narrow, "'_narrow' plans 2 experts, and there are 4"),
    ],
)  # fmt: skip
def test_plans_that_cannot_be(policy: object, said: str) -> None:
    with pytest.raises(InputError, match=said):
        ExpertCopies(policy, 1).plan(np.array([[3, 1, 1, 1], [3, 1, 1, 1]]), 2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ExpertCopies("nobody"), "policy='nobody' of expert copies is not available; use one of 'joint', 'greedy',"),
        (lambda: ExpertCopies(max_copies_per_rank=0), "max_copies_per_rank=0 leaves no room for copies"),
        (lambda: DispatchConfig(capacity_factor=1.0, pad_to_capacity=True, copies=ExpertCopies()), "pad_to_capacity gives"),
        (lambda: settle(DispatchConfig(copies=ExpertCopies()), 8, 2, Fold(2)), "expert_copies even out the ranks of ep"),
    ],
)  # fmt: skip
def test_bad_input(make: object, said: str) -> None:
    with pytest.raises(InputError, match=said):
        make()  # type: ignore[operator]


def test_auto_goes_by_all_to_all() -> None:
    config = settle(DispatchConfig("auto", copies=ExpertCopies()), 8, 4, Fold.parse("| ep2", 2))
    assert config.dispatcher == "alltoall"


def test_policies_by_name_have_costs_of_the_device() -> None:
    """Each plans by exact counts, and none is left without the constants that it asks for."""
    counts_SE = np.array([[4000, 10, 10, 10], [4000, 10, 10, 10]])
    for name in FAST_POLICIES:
        copies = ExpertCopies(name, 1).priced("cpu", 1 << 12, 2)
        assert copies.plan(counts_SE, 2).quota_RE.sum(0).tolist() == counts_SE.sum(0).tolist()
    cheap, dear = (
        ExpertCopies("joint", 1, BalanceCosts.assumed("cpu", 1 << 12, parts=2, byte_ps=ps)) for ps in (1, 10**9)
    )
    assert cheap.plan(counts_SE, 2).copies == 1
    assert dear.plan(counts_SE, 2).copies == 0
    assert ExpertCopies("joint", 1, "given").priced("cpu", 1, 2).costs == "given"
    by_counts = {name for name, policy in POLICIES.items() if policy().copies is CopiesFrom.PASS}
    assert set(FAST_POLICIES) == by_counts | {"greedy"}

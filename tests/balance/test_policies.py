# SPDX-License-Identifier: Apache-2.0
"""Each policy decides as its source says, and within the mechanism's laws."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lightning_moefold.balance.assignment import copies_of, pass_time, shared_out
from lightning_moefold.balance.placement import Placement
from lightning_moefold.balance.policies import POLICIES, make_policy
from lightning_moefold.balance.policies.base import CopiesFrom, even_split
from lightning_moefold.balance.policies.eplb import homes, pack_replicas
from lightning_moefold.balance.policies.joint import Joint
from lightning_moefold.balance.policies.llep import LLEP
from lightning_moefold.errors import InputError
from tests.balance.test_fill import COSTS, skewed


def from_sources(rows_E: np.ndarray, sources: int) -> np.ndarray:
    return np.stack([rows_E // sources + (s < rows_E % sources) for s in range(sources)])


@pytest.mark.parametrize("name", POLICIES)
def test_laws(name: str) -> None:
    """Homes are a placement, assignments have all rows and keep to the budget, and nobody draws lots."""
    parts, experts = 4, 12
    for seed in range(6):
        slots = seed % 3
        policy = make_policy(name, slots)
        load_NE = np.stack([skewed(seed + n, experts) for n in range(3)])
        current = Placement(tuple(np.random.default_rng(seed).permutation(experts).tolist()), parts)
        new = policy.place(load_NE, current, COSTS)
        assert new.parts == parts
        assert new == policy.place(load_NE, current, COSTS)
        assert policy.moves or new is current
        owner_E = np.asarray(new.part_of_expert)
        stay = [e for e in range(experts) if current.part_of_expert[e] == owner_E[e]]
        assert all(current.slot_of_expert[e] == new.slot_of_expert[e] for e in stay)
        counts_SE = from_sources(skewed(seed + 9, experts), parts)
        share_RE = policy.replicas(load_NE, np.zeros((parts, experts), dtype=np.int64), owner_E, COSTS)
        for quota_RE in (
            policy.plan(counts_SE, owner_E, COSTS, slots), policy.divide(counts_SE.sum(0), share_RE, owner_E)
        ):  # fmt: skip
            assert quota_RE.dtype == np.int64
            assert (quota_RE >= 0).all()
            assert (quota_RE.sum(0) == counts_SE.sum(0)).all()
            assert copies_of(quota_RE, owner_E).sum(1).max() <= slots


def test_registry() -> None:
    assert list(POLICIES) == [
        "contiguous", "smartmoe_greedy", "eplb", "flexmoe", "fastermoe_shadow", "llep", "joint",
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"policy 'lleep' is not known \(did you mean llep\?\); use contiguous, "):
        make_policy("lleep")
    with pytest.raises(InputError, match="max_copies_per_rank=-1 must not be negative"):
        make_policy("joint", -1)


def test_contiguous_leaves_all() -> None:
    policy = make_policy("contiguous")
    assert policy.copies is CopiesFrom.NOTHING
    counts_SE = from_sources(skewed(0, 8), 2)
    assert policy.plan(counts_SE, np.repeat([0, 1], 4), COSTS, 1).sum(1).tolist() == [
        counts_SE[:, :4].sum(), counts_SE[:, 4:].sum(),
    ]  # fmt: skip


def test_smartmoe_packs_greedily() -> None:
    policy, current = make_policy("smartmoe_greedy"), Placement.contiguous(4, 2)
    new = policy.place(np.array([[9, 8, 1, 1]]), current, COSTS)
    assert {frozenset(e for e in range(4) if new.part_of_expert[e] == p) for p in range(2)} == {
        frozenset({0, 2}), frozenset({1, 3}),
    } or {frozenset({0, 3}), frozenset({1, 2})}  # fmt: skip
    # The last two intervals count, and a placement that is no better is left.
    assert policy.place(np.array([[9, 8, 1, 1], [5, 5, 5, 5], [5, 5, 5, 5]]), current, COSTS) is current
    # It moves for a single row, whatever a move costs.
    dear = replace(COSTS, near_move_ps=10**15)
    assert policy.place(np.array([[6, 5, 5, 5]]), current, dear) is current
    assert policy.place(np.array([[6, 6, 5, 5]]), current, dear) is not current


def test_eplb_replicates_and_packs() -> None:
    """The example of two hot experts: replicas by load for each replica, as many slots on every rank."""
    replicas_RE = pack_replicas(np.array([90, 50, 20, 10]), 2, 1)
    assert replicas_RE.sum(0).tolist() == [2, 2, 1, 1]
    assert replicas_RE.sum(1).tolist() == [3, 3]
    policy = make_policy("eplb")
    owner_E = np.asarray(policy.place(np.array([[90, 50, 20, 10]]), Placement.contiguous(4, 2), COSTS).part_of_expert)
    share_RE = policy.replicas(np.array([[90, 50, 20, 10]]), np.zeros((2, 4), dtype=np.int64), owner_E, COSTS)
    quota_RE = policy.divide(np.array([91, 50, 20, 10]), share_RE, owner_E)
    assert sorted(quota_RE[:, 0].tolist()) == [45, 46]


def test_homes_among_holders() -> None:
    held_RE = np.array([[1, 1, 0, 1], [1, 0, 1, 1]], dtype=bool)
    home_E = homes(held_RE, np.array([0, 0, 1, 1]))
    assert home_E.tolist() == [0, 0, 1, 1]
    assert homes(held_RE, np.array([1, 1, 0, 0])).tolist() == [1, 0, 1, 0]
    # Both replicas of expert 0 on one rank, and too few holders on the other: someone has to live where no replica is.
    assert np.bincount(homes(np.array([[1, 1, 1], [0, 0, 0], [0, 0, 0]], dtype=bool), np.arange(3))).tolist() == [
        1,
        1,
        1,
    ]


def test_flexmoe_expands_and_shrinks() -> None:
    policy, owner_E = make_policy("flexmoe"), np.arange(4)
    cheap = replace(COSTS, near_copy_ps=0, exchange_ps=0)
    first = policy.replicas(np.array([[900, 40, 30, 30]]), np.zeros((4, 4), dtype=np.int64), owner_E, cheap)
    assert (first[:, 0] > 0).all()
    second = policy.replicas(np.array([[30, 900, 30, 40]]), first, owner_E, cheap)
    assert (second[:, 1] > 0).sum() > 1
    assert (second[:, 0] > 0).sum() < 4
    dear = replace(COSTS, near_copy_ps=10**9)
    kept = policy.replicas(np.array([[900, 40, 30, 30]]), np.zeros((4, 4), dtype=np.int64), owner_E, dear)
    assert not copies_of(kept, owner_E).any()


def test_fastermoe_sums_over_sources() -> None:
    """FM#204: with equal batches on all ranks the other axis shadows nothing."""
    counts_SE = np.tile(np.array([70, 10, 10, 10]), (4, 1)) * 10
    quota_RE = make_policy("fastermoe_shadow").plan(counts_SE, np.arange(4), COSTS, 1)
    assert quota_RE[:, 0].tolist() == [700] * 4
    assert not copies_of(quota_RE, np.arange(4))[:, 1:].any()
    dear = replace(COSTS, near_copy_ps=10**9)
    assert not copies_of(make_policy("fastermoe_shadow").plan(counts_SE, np.arange(4), dear, 1), np.arange(4)).any()


def test_llep_spills_to_the_least_loaded() -> None:
    rows_E = np.array([7000, 500, 300, 200])
    counts_SE = from_sources(rows_E, 4)
    quota_RE = LLEP(3).plan(counts_SE, np.arange(4), COSTS, 3)
    assert quota_RE.sum(1).tolist() == [2000] * 4  # whole rooms of at least 1,024 rows, and what is left
    assert quota_RE[:, 0].tolist() == [2000, 1500, 1700, 1800]
    mild_E = np.array([2500, 1900, 1900, 1700])
    assert not copies_of(LLEP(3).plan(from_sources(mild_E, 4), np.arange(4), COSTS, 3), np.arange(4)).any()
    # Parts smaller than 1,024 rows are not worth a product: all of it goes to the least loaded.
    tight_E = np.array([2600, 1900, 1800, 1700])
    quota_RE = LLEP(3, trigger=1.0).plan(from_sources(tight_E, 4), np.arange(4), COSTS, 3)
    assert quota_RE[:, 0].tolist() == [2000, 0, 0, 600]


def test_shares_are_whole_rows() -> None:
    share_RE = np.array([[1, 0], [1, 3], [1, 0]])
    assert shared_out(np.array([8, 4]), share_RE, np.array([0, 2])).tolist() == [[3, 0], [3, 4], [2, 0]]
    # An expert without rows in the plan is computed at home.
    assert shared_out(np.array([8, 4]), share_RE * [1, 0], np.array([0, 2])).tolist() == [[3, 0], [3, 0], [2, 4]]
    assert even_split(np.array([5]), np.array([[1], [0], [1]])).tolist() == [[3], [0], [2]]


@pytest.mark.parametrize("slots", [1, 2])
def test_joint_moves_for_what_copies_do_not_mend(slots: int) -> None:
    """Two hot experts on one rank: copies mend that in every pass, a move once."""
    load_NE = np.tile(np.array([1000, 1000, 20, 20, 20, 20, 20, 20]), (4, 1))
    current = Placement.contiguous(8, 4)
    joint = Joint(slots)
    costs = replace(COSTS, horizon=100_000)
    new = joint.place(load_NE, current, costs)
    assert new.part_of_expert[0] != new.part_of_expert[1]

    def score(placement: Placement) -> int:
        owner_E = np.asarray(placement.part_of_expert)
        return pass_time(joint.plan(from_sources(load_NE[0], 4), owner_E, costs, slots), owner_E, costs).score

    assert score(new) < score(current)
    # It does not move where a move does not pay within the horizon, where the gain is below the margin, or where it is off.
    assert joint.place(load_NE, current, replace(costs, horizon=1)) is current
    assert joint.place(load_NE, current, replace(costs, margin_ppm=999_999)) is current
    assert Joint(slots, slow=False).place(load_NE, current, costs) is current
    # Once there, it stays.
    assert joint.place(load_NE, new, replace(costs, margin_ppm=0)) is new
    # With a margin of zero it needs neither history nor horizon.
    eager = replace(costs, margin_ppm=0, horizon=0)
    assert score(joint.place(load_NE[:1], current, eager)) < score(current)


def test_joint_leaves_what_changes_all_the_time() -> None:
    load_NE = np.full((4, 8), 20)
    load_NE[np.arange(4), [0, 3, 5, 7]] = 2000
    costs = replace(COSTS, horizon=10**6, margin_ppm=1)
    assert Joint(2).place(load_NE, Placement.contiguous(8, 4), costs).part_of_expert == (0, 0, 1, 1, 2, 2, 3, 3)


def test_joint_copies_from_past_loads_when_fast_is_off() -> None:
    joint, owner_E = Joint(1, fast=False), np.arange(4)
    assert joint.copies is CopiesFrom.PAST
    assert Joint(1).copies is CopiesFrom.PASS
    share_RE = joint.replicas(np.array([[900, 40, 30, 30]]), np.zeros((4, 4), dtype=np.int64), owner_E, COSTS)
    quota_RE = joint.divide(np.array([1000, 40, 30, 30]), share_RE, owner_E)
    assert quota_RE.sum(1).max() <= 276  # the mean is 275


def test_joint_scales_past_loads_to_a_pass() -> None:
    """Intervals of a thousand steps say the same as one pass does, at the price of a pass."""
    load_NE = np.tile(np.array([1000, 1000, 20, 20, 20, 20, 20, 20]), (4, 1))
    costs = replace(COSTS, horizon=10)
    of_one = Joint(1).place(load_NE, Placement.contiguous(8, 4), costs)
    long = load_NE * np.array([[1000], [500], [2000], [1000]])
    assert Joint(1).place(long, Placement.contiguous(8, 4), replace(costs, pass_rows=int(load_NE[0].sum()))) == of_one
    # Loads of a small pass move nothing, however many passes were counted.
    small = replace(costs, pass_rows=40)
    assert Joint(1).place(long, Placement.contiguous(8, 4), small) == Placement.contiguous(8, 4)


def test_joint_keeps_copies_within_a_node() -> None:
    """Of two nodes with two ranks each, the one with the hot expert is kept free for its copies, and no copy leaves it."""
    load_NE = np.tile(np.array([1000, 20, 500, 480, 20, 20, 20, 20]), (4, 1))
    costs = replace(COSTS, parts_per_node=2, horizon=10**6)
    joint = Joint(1)
    new = joint.place(load_NE, Placement.contiguous(8, 4), costs)
    owner_E = np.asarray(new.part_of_expert)
    quota_RE = joint.plan(from_sources(load_NE[0], 4), owner_E, costs, 1)
    helpers, experts = np.nonzero(copies_of(quota_RE, owner_E))
    assert (helpers // 2 == owner_E[experts] // 2).all()
    assert quota_RE.sum(1).max() < 560  # the mean is 520

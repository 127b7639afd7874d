# SPDX-License-Identifier: Apache-2.0
"""Copies for one pass, against the optimum of small instances, and their laws on all."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_moefold.balance.assignment import copies_of, imbalance, pass_time
from lightning_moefold.balance.costs import BalanceCosts
from lightning_moefold.balance.fill import Layout, plan_copies
from lightning_moefold.balance.split import split_exactly
from lightning_moefold.balance.workloads import generate
from tests.balance.optimum import least_load, least_score

COSTS = BalanceCosts(
    row_ps=1000, product_ps=0, near_copy_ps=40_000, far_copy_ps=400_000, exchange_ps=5_000, near_move_ps=100_000,
    far_move_ps=1_000_000, copy_bytes=10, move_bytes=30, parts_per_node=8,
)  # fmt: skip


def skewed(seed: int, experts: int, rows: int = 4000, spread: float = 1.8) -> np.ndarray:
    random = np.random.default_rng(seed)
    share = np.exp(spread * random.standard_normal(experts))
    return random.multinomial(rows, share / share.sum()).astype(np.int64)


@st.composite
def instances(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int, BalanceCosts, int]:
    parts, local = draw(st.integers(2, 6)), draw(st.integers(1, 4))
    rows_E = np.array(draw(st.lists(st.integers(0, 3000), min_size=parts * local, max_size=parts * local)))
    owner_E = np.array(draw(st.permutations([part for part in range(parts) for _ in range(local)])))
    costs = replace(
        COSTS, parts_per_node=draw(st.integers(1, parts)), near_copy_ps=draw(st.sampled_from([0, 500, 40_000])),
        product_ps=draw(st.sampled_from([0, 3000])),
    )  # fmt: skip
    return rows_E, owner_E, parts, costs, draw(st.integers(0, 3))


@settings(max_examples=150, deadline=None)
@given(instances())
def test_laws_of_a_plan(instance) -> None:
    rows_E, owner_E, parts, costs, slots = instance
    quota_RE = plan_copies(rows_E, owner_E, parts, costs, slots)
    assert quota_RE.dtype == np.int64
    assert (quota_RE >= 0).all()
    assert (quota_RE.sum(0) == rows_E).all()
    copies = copies_of(quota_RE, owner_E)
    assert copies.sum(1).max() <= slots
    layout = Layout(rows_E.tolist(), owner_E.tolist(), parts, costs, slots)
    without = layout.score([])
    best = layout.best_copies()
    assert layout.score(best) <= without
    assert (layout.score(best) < without) == bool(best)
    # The planner's own arithmetic says what the tables say, but for experts whose last row has left their home.
    assert pass_time(quota_RE, owner_E, costs).score <= layout.score(best)
    if not costs.product_ps:
        assert pass_time(quota_RE, owner_E, costs).score == layout.score(best)
    assert (plan_copies(rows_E, owner_E, parts, costs, slots) == quota_RE).all()


def test_near_the_optimum(record_property) -> None:
    """Gap of the score to that of integer programming."""
    gaps = []
    for seed in range(10):
        rows_E, owner_E, slots = skewed(seed, 12), np.repeat(np.arange(4), 3), 1 + seed % 2
        costs = replace(COSTS, near_copy_ps=(5_000, 40_000, 200_000)[seed % 3], parts_per_node=(4, 2)[seed // 5])
        ours = pass_time(plan_copies(rows_E, owner_E, 4, costs, slots), owner_E, costs).score
        best = least_score(rows_E, owner_E, 4, costs, slots)
        assert ours >= best - costs.row_ps - 1
        gaps.append(ours / best - 1)
    record_property("gap_mean", float(np.mean(gaps)))
    print("gaps to the optimum:", np.round(gaps, 4))
    assert np.mean(gaps) < 0.03
    assert max(gaps) < 0.15


def test_copies_that_pay_reach_exact_balance_with_one_slot() -> None:
    """R - 1 copies, one a rank, suffice wherever an expert is large enough to be cut."""
    rows_E, owner_E = np.array([900, 10, 60, 30, 50, 50, 20, 80]), np.repeat(np.arange(4), 2)
    quota_RE = plan_copies(rows_E, owner_E, 4, replace(COSTS, near_copy_ps=0, exchange_ps=0), 1)
    assert quota_RE.sum(1).tolist() == [300] * 4
    assert copies_of(quota_RE, owner_E).sum() == 3


def test_no_copy_where_none_pays() -> None:
    rows_E, owner_E = np.array([130, 100, 100, 100]), np.arange(4)
    dear, cheap = (replace(COSTS, near_copy_ps=rows * COSTS.row_ps, exchange_ps=0) for rows in (40, 5))
    assert not copies_of(plan_copies(rows_E, owner_E, 4, dear, 1), owner_E).any()
    assert copies_of(plan_copies(rows_E, owner_E, 4, cheap, 1), owner_E).any()


def test_links_decide() -> None:
    """What is worth a copy within a node is not worth one between nodes."""
    rows_E = np.array([400, 300, 0, 0])
    costs = replace(COSTS, near_copy_ps=10_000, far_copy_ps=10_000_000, parts_per_node=2)
    quota_RE = plan_copies(rows_E, np.arange(4), 4, costs, 1)
    assert set(zip(*np.nonzero(copies_of(quota_RE, np.arange(4))), strict=True)) <= {(1, 0), (0, 1)}
    everywhere = plan_copies(rows_E, np.arange(4), 4, replace(costs, far_copy_ps=10_000), 1)
    assert everywhere.sum(1).max() < quota_RE.sum(1).max()


def test_rows_over_given_copies(record_property) -> None:
    """Gap of the busiest rank to maximum flow, where copies were planned for other rows."""
    gaps = []
    for seed in range(30):
        owner_E = np.repeat(np.arange(6), 2)
        planned, rows_E = skewed(seed, 12), skewed(seed, 12, spread=1.6)
        share_RE = plan_copies(planned, owner_E, 6, replace(COSTS, near_copy_ps=0), 1 + seed % 2)
        quota_RE = split_exactly(rows_E, share_RE, owner_E)
        assert (quota_RE >= 0).all()
        assert (quota_RE.sum(0) == rows_E).all()
        assert (copies_of(quota_RE, owner_E) <= copies_of(share_RE, owner_E)).all()
        held_RE = copies_of(share_RE, owner_E)
        held_RE[owner_E, np.arange(12)] = True
        best = least_load(rows_E, held_RE)
        assert quota_RE.sum(1).max() >= best
        gaps.append(quota_RE.sum(1).max() / best - 1)
    record_property("gap_mean", float(np.mean(gaps)))
    print("gaps to maximum flow:", np.round(gaps, 4))
    assert np.mean(gaps) < 0.02


def test_fine_balance_of_a_skewed_run() -> None:
    """Eight copies at ep = 8 on routing as training makes it: the busiest rank 2% above the mean if copies cost nothing."""
    trace = generate("training", records=20, every=50, layers=2)
    free = replace(COSTS, near_copy_ps=0, exchange_ps=0)
    owner_E = np.repeat(np.arange(8), 4)
    found = [imbalance(plan_copies(rows_E, owner_E, 8, free, 1)) for rows_E in trace.counts_NLSE.sum(2).reshape(-1, 32)]
    assert np.mean(found) < 1.02


def test_planning_is_fast() -> None:
    """256 experts on 64 ranks, in CPU time of this process: the bound of a millisecond is benchmarked, this is three times it."""
    rows_E, owner_E = skewed(0, 256, 64 * 16384), np.repeat(np.arange(64), 4)
    costs = replace(COSTS, parts_per_node=64)
    times = []
    for _ in range(7):
        started = time.process_time()
        plan_copies(rows_E, owner_E, 64, costs, 1)
        times.append(time.process_time() - started)
    assert min(times) < 3e-3


@pytest.mark.parametrize("rows", [np.zeros(8), np.full(8, 5)])
def test_nothing_to_do(rows: np.ndarray) -> None:
    quota_RE = plan_copies(rows.astype(np.int64), np.repeat(np.arange(4), 2), 4, COSTS, 2)
    assert not copies_of(quota_RE, np.repeat(np.arange(4), 2)).any()

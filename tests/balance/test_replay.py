# SPDX-License-Identifier: Apache-2.0
"""Replays of generated traces, and the generator itself."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_moefold.balance.costs import BalanceCosts
from lightning_moefold.balance.policies import make_policy
from lightning_moefold.balance.policies.base import Policy
from lightning_moefold.balance.policies.joint import Joint
from lightning_moefold.balance.replay import replay
from lightning_moefold.balance.trace import RoutingTrace
from lightning_moefold.balance.workloads import WORKLOADS, chosen_part, generate
from lightning_moefold.errors import InputError
from lightning_moefold.planner.machine.hardware import find_hardware

COSTS = BalanceCosts.of(find_hardware("dgx-h100"), 4096, 1536, parts=8)


@pytest.mark.parametrize("workload", WORKLOADS)
def test_joint_is_never_the_worse_choice(workload: str) -> None:
    """Against nothing, its fast half alone and its slow half alone; all costs included."""
    trace = generate(workload, records=12, layers=1)
    seconds = {
        name: replay(trace, policy, COSTS, 8).step_seconds
        for name, policy in {
            "nothing": make_policy("contiguous"), "fast": Joint(1, slow=False), "slow": Joint(1, fast=False),
        }.items()
    }  # fmt: skip
    assert replay(trace, Joint(1), COSTS, 8).step_seconds <= min(seconds.values()) * 1.0001


class _Watching(Policy):
    """Remembers what it was shown."""

    moves, seen = True, []

    def place(self, load_NE, current, costs):
        self.seen.append((load_NE.copy(), costs.horizon))
        return current


def test_the_slow_loop_is_behind() -> None:
    counts = np.arange(6)[:, None, None, None] * np.ones((1, 1, 1, 4), dtype=np.int64)
    trace = RoutingTrace(np.array([0, 4, 8, 12, 16, 30]), counts.astype(np.int64))
    _Watching.seen.clear()
    replay(trace, _Watching(), COSTS, 2, stale=10)
    assert [load_NE[-1, 0] for load_NE, _ in _Watching.seen] == [0, 1, 4]  # at iterations 12, 16, 30
    assert [horizon for _, horizon in _Watching.seen] == [4, 8, 4]


def test_what_is_counted() -> None:
    counts = np.tile(np.array([80, 80, 20, 20]), (3, 2, 1, 1))
    trace = RoutingTrace(np.array([0, 10, 20]), counts)
    found = replay(trace, make_policy("smartmoe_greedy"), COSTS, 2)
    assert found.imbalance_NL[:, 0].tolist() == [1.6, 1.0, 1.0]
    assert found.moves_NL.tolist() == [[0, 0], [2, 2], [0, 0]]
    assert found.moved_bytes == 4 * COSTS.move_bytes
    assert found.migrating_checks() == pytest.approx(1 / 3)
    assert found.migrating_checks(after=20) == 0
    rows = np.array([160, 100, 100]) * COSTS.row_ps + 2 * COSTS.product_ps
    assert found.step_seconds == pytest.approx((2 * rows.sum() + 2 * COSTS.near_move_ps / 10) / 3 / 1e12)
    assert found.copied_bytes == 0


def test_ranks_that_cannot_be_balanced() -> None:
    trace = generate("balanced", records=2, experts=12)
    with pytest.raises(InputError, match="ep=1 leaves nothing to balance"):
        replay(trace, make_policy("joint"), COSTS, 1)
    with pytest.raises(InputError, match="12 experts do not go over ep=8; use ep in 2, 3, 4, 6, 12"):
        replay(trace, make_policy("joint"), COSTS, 8)


# ---- the generator -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("experts", "top_k", "sigma", "gini", "busiest"),
    [(32, 2, 0.2, 0.11, 1.5), (32, 2, 1.0, 0.48, 4.9), (32, 2, 2.5, 0.81, 11.6), (8, 2, 0.6, 0.26, 1.88), (64, 6, 0.4, 0.21, 2.28)],
)  # fmt: skip
def test_skew_is_that_of_recorded_runs(experts: int, top_k: int, sigma: float, gini: float, busiest: float) -> None:
    scores = sigma * np.random.default_rng(0).standard_normal((400, experts))
    share = np.sort(chosen_part(scores, top_k) / top_k, 1)
    assert share.max() <= 1 / top_k + 1e-9
    found = 1 - 2 * (np.cumsum(share, 1) - share / 2).sum(1) / experts
    assert found.mean() == pytest.approx(gini, abs=0.025)
    assert (share[:, -1] * experts).mean() == pytest.approx(busiest, rel=0.12)


def test_drift_is_that_of_a_recorded_run() -> None:
    trace = generate("training", records=160, layers=6, sources=1, tokens=65536)
    share = trace.counts_NLSE.sum(2) / trace.counts_NLSE.sum((2, 3))[..., None]
    drift = 0.5 * np.abs(np.diff(share, axis=0)).sum(2).mean(1)
    assert drift[2:20].mean() == pytest.approx(0.19, abs=0.06)
    assert drift[22:98].mean() == pytest.approx(0.037, abs=0.01)
    assert drift[102:].mean() == pytest.approx(0.022, abs=0.006)


def test_workloads_are_what_they_are_called() -> None:
    made = {name: generate(name, records=9, layers=2).counts_NLSE for name in WORKLOADS}

    def busiest(counts: np.ndarray, axis: int) -> float:
        return float((counts.max(axis) / counts.mean(axis)).mean())

    rows = {name: counts.sum(2) for name, counts in made.items()}
    ranks = {name: rows_NLE.reshape(9, 2, 8, 4).sum(3) for name, rows_NLE in rows.items()}
    assert busiest(rows["balanced"], 2) < 1.05
    assert busiest(rows["hot_experts"], 2) > 4
    assert busiest(ranks["hot_rank"], 2) > 4 > 1.3 > busiest(ranks["spread_hot"], 2)
    assert busiest(rows["spread_hot"], 2) > 2
    assert busiest(made["source_ragged"].sum(3), 2) > 1.7
    assert (rows["zero_load"][:, :, :4] == 0).all()
    assert (ranks["zero_load"][:, :, 1:] > 0).all()
    assert len(set(rows["rotating_hotspot"][:, 0].argmax(1).tolist())) > 5
    assert (rows["burst"].max(2) > 5 * rows["burst"].mean(2)).sum() == 2  # record 3, both layers


def test_draws_depend_on_workload_seed_and_step_only() -> None:
    long, short = generate("training", records=9), generate("training", records=4)
    assert (long.counts_NLSE[:1] == short.counts_NLSE[:1]).all()
    assert (generate("burst", records=3).counts_NLSE == generate("burst", records=3).counts_NLSE).all()
    assert (generate("burst", records=3).counts_NLSE != generate("burst", records=3, seed=1).counts_NLSE).any()
    with pytest.raises(InputError, match="workload 'bursts' is not known; use balanced"):
        generate("bursts")

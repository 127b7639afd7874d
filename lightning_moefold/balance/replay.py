# SPDX-License-Identifier: Apache-2.0
"""Replays a recorded run under a policy: its moves and copies, the balance of ranks, and the predicted time of steps.

Each record of a trace is a check. Before a check the slow loop decides from loads that are at least ``stale``
iterations old; the fast loop sees the record's own counts. The time of a step is that of all layers' expert passes with
their copies, plus its share of the moves before the next check. Everything else in a step is ignored.

Legend: N checks, L layers, R ranks of ep, E experts, S sources.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lightning_moefold.balance.assignment import Counts, at_home, copies_of, pass_time
from lightning_moefold.balance.costs import BalanceCosts
from lightning_moefold.balance.placement import Placement
from lightning_moefold.balance.policies.base import CopiesFrom, Policy
from lightning_moefold.balance.pool import PlacementPool
from lightning_moefold.balance.trace import RoutingTrace
from lightning_moefold.errors import InputError

#: Maximum number of past intervals that a policy sees.
_HISTORY = 8


@dataclass(frozen=True, eq=False)
class Replay:
    """The result of a replay.

    Args:
        iterations_N: Iteration of each check.
        rows_NLR: Number of rows that each rank computes.
        copies_NL: Number of copies in each pass.
        moves_NL: Number of experts that changed their rank before the check.
        pass_ps_NL: Predicted picoseconds of a pass, copies included.
        copy_ps_NL: The part of these picoseconds in which copies travel.
        move_ps_N: Picoseconds of all moves before a check.
        part_NLE: Home rank of each expert.
        costs: Constants of the prediction.
    """

    iterations_N: Counts
    rows_NLR: Counts
    copies_NL: Counts
    moves_NL: Counts
    pass_ps_NL: Counts
    copy_ps_NL: Counts
    move_ps_N: Counts
    part_NLE: NDArray[np.int16]
    costs: BalanceCosts

    @property
    def imbalance_NL(self) -> NDArray[np.float64]:
        """Rows of the busiest rank divided by the mean; 1 without rows."""
        rows = self.rows_NLR
        total = rows.sum(2)
        return np.where(total > 0, rows.max(2) * rows.shape[2] / np.maximum(total, 1), 1.0)

    @property
    def imbalance(self) -> float:
        """Busiest rank's rows divided by the mean, averaged over checks and layers."""
        return float(self.imbalance_NL.mean())

    @property
    def moved_bytes(self) -> int:
        """Number of bytes sent by all moves."""
        return int(self.moves_NL.sum()) * self.costs.move_bytes

    @property
    def copied_bytes(self) -> float:
        """Average number of bytes that copies send in an optimizer step, over all layers and ranks."""
        return float(self.copies_NL.sum(1).mean()) * self.costs.copy_bytes * self.costs.passes

    def migrating_checks(self, after: int = 0) -> float:
        """Returns the share of a layer's checks, from iteration ``after`` on, before which an expert changed its rank."""
        late = self.moves_NL[self.iterations_N >= after]
        return float((late > 0).mean()) if late.size else 0.0

    @property
    def step_seconds(self) -> float:
        """Predicted seconds of the experts in a step: passes, copies and moves."""
        return self.compute_seconds + self.copy_seconds + self.move_seconds

    @property
    def compute_seconds(self) -> float:
        """Seconds of the busiest ranks' rows in a step."""
        return float((self.pass_ps_NL - self.copy_ps_NL).sum(1).mean()) * self.costs.passes / 1e12

    @property
    def copy_seconds(self) -> float:
        """Seconds in which copies travel in a step."""
        return float(self.copy_ps_NL.sum(1).mean()) * self.costs.passes / 1e12

    @property
    def move_seconds(self) -> float:
        """Seconds of moves, on average over steps."""
        between = np.diff(self.iterations_N, append=self.iterations_N[-1] + _usual_gap(self.iterations_N))
        return float((self.move_ps_N / between).mean()) / 1e12


def _usual_gap(iterations_N: Counts) -> int:
    return int(np.median(np.diff(iterations_N))) if len(iterations_N) > 1 else 1


def replay(
    trace: RoutingTrace,
    policy: Policy,
    costs: BalanceCosts,
    parts: int,
    stale: int = 10,
    pool: PlacementPool | None = None,
) -> Replay:
    """Replays a trace under a policy.

    Args:
        trace: A recorded or generated trace.
        policy: The policy to replay.
        costs: Constants of the prediction.
        parts: Number of ranks of ep.
        stale: Minimum age, in iterations, of the loads that the slow loop sees.
        pool: Placements that the slow loop may choose as well.

    Raises:
        InputError: If ``parts`` is 1 or does not divide the experts, or the pool is of another model.
    """
    check_parts(trace.experts, parts)
    trace = trace.for_sources(parts)
    n_, l_, _, e_ = trace.counts_NLSE.shape
    load_NLE = trace.counts_NLSE.sum(2)
    rows_NLR, part_NLE = np.zeros((n_, l_, parts), dtype=np.int64), np.zeros((n_, l_, e_), dtype=np.int16)
    copies_NL, moves_NL, pass_ps_NL, copy_ps_NL = (np.zeros((n_, l_), dtype=np.int64) for _ in range(4))
    move_ps_N = np.zeros(n_, dtype=np.int64)
    placements = [Placement.contiguous(e_, parts) for _ in range(l_)]
    names = list(map(str, range(l_)))
    offered = {} if pool is None else pool.by_name(names, dict(zip(names, placements, strict=True)))
    shares = [np.zeros((parts, e_), dtype=np.int64) for _ in range(l_)]
    for n, iteration in enumerate(trace.iterations_N):
        known = int(np.searchsorted(trace.iterations_N, iteration - stale, side="right"))
        first = max(0, known - _HISTORY)
        now = replace(costs, horizon=_horizon(trace.iterations_N, first, known, n, costs))
        for layer in range(l_):
            old = np.asarray(placements[layer].part_of_expert)
            past_NE = load_NLE[first:known, layer]
            if known and (policy.moves or offered):
                placements[layer] = policy.choose(past_NE, placements[layer], now, offered.get(names[layer], ()))
            owner_E = np.asarray(placements[layer].part_of_expert)
            if known and policy.copies is CopiesFrom.PAST:
                shares[layer] = policy.replicas(past_NE, shares[layer], owner_E, now)
            quota_RE = _assignment(policy, trace.counts_NLSE[n, layer], shares[layer], owner_E, now)
            rows_NLR[n, layer], part_NLE[n, layer] = quota_RE.sum(1), owner_E
            copies_NL[n, layer] = copies_of(quota_RE, owner_E).sum()
            moves_NL[n, layer] = (old != owner_E).sum()
            time = pass_time(quota_RE, owner_E, costs)
            pass_ps_NL[n, layer], copy_ps_NL[n, layer] = time.total, time.exchange
            move_ps_N[n] += costs.move_ps(old.tolist(), owner_E.tolist(), parts)
    return Replay(trace.iterations_N, rows_NLR, copies_NL, moves_NL, pass_ps_NL, copy_ps_NL, move_ps_N, part_NLE, costs)


def _assignment(policy: Policy, counts_SE: Counts, share_RE: Counts, owner_E: Counts, costs: BalanceCosts) -> Counts:
    if policy.copies is CopiesFrom.PASS:
        return policy.plan(counts_SE, owner_E, costs, policy.max_copies_per_rank)
    if policy.copies is CopiesFrom.PAST:
        return policy.divide(counts_SE.sum(0), share_RE, owner_E)
    return at_home(counts_SE.sum(0), owner_E, len(counts_SE))


def _horizon(iterations_N: Counts, first: int, known: int, n: int, costs: BalanceCosts) -> int:
    """Returns the expected remaining duration of a pattern: as long as it has been seen, but not beyond the end of the run."""
    if not known:
        return 0
    gap = _usual_gap(iterations_N)
    seen = int(iterations_N[known - 1] - iterations_N[first]) + gap
    return min(costs.horizon, seen, int(iterations_N[-1] - iterations_N[n]) + gap)


def check_parts(experts: int, parts: int) -> None:
    """Refuses numbers of ranks over which experts cannot be balanced.

    Raises:
        InputError: If ``parts`` is 1 or does not divide the experts.
    """
    if parts < 2:
        raise InputError(f"ep={parts} leaves nothing to balance, every rank holds all experts; give at least 2.")
    if experts % parts:
        fit = [p for p in range(2, experts + 1) if experts % p == 0]
        raise InputError(f"{experts} experts do not go over ep={parts}; use ep in {', '.join(map(str, fit))}.")

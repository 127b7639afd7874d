# SPDX-License-Identifier: Apache-2.0
"""A recorded run under a policy: what it would have moved and copied, how even ranks and how long steps would have been.

Each record of a trace is a check. Before it the slow loop decides with loads that are at least ``stale`` iterations old; the
fast loop sees the record's own counts. A step takes the pass of every layer's experts with its copies, and its part of the
moves that were made before the next check. What is not the experts' is left out.

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
from lightning_moefold.balance.trace import RoutingTrace
from lightning_moefold.errors import InputError

#: Intervals of history that a policy sees at most.
_HISTORY = 8


@dataclass(frozen=True, eq=False)
class Replay:
    """What a policy would have done.

    Args:
        iterations_N: Of each check.
        rows_NLR: Rows that each rank computes.
        copies_NL: Copies of each pass.
        moves_NL: Experts that changed their rank before the check.
        pass_ps_NL: Predicted picoseconds of a pass, copies included.
        copy_ps_NL: Of these, in which copies travel.
        move_ps_N: Picoseconds in which all moves before a check are made.
        part_NLE: Home of each expert.
        costs: Constants that were used.
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
        """Rows of the busiest rank over the mean; 1 without rows."""
        rows = self.rows_NLR
        total = rows.sum(2)
        return np.where(total > 0, rows.max(2) * rows.shape[2] / np.maximum(total, 1), 1.0)

    @property
    def imbalance(self) -> float:
        """Mean over checks and layers of the busiest rank's rows over the mean."""
        return float(self.imbalance_NL.mean())

    @property
    def moved_bytes(self) -> int:
        """Bytes that all moves sent."""
        return int(self.moves_NL.sum()) * self.costs.move_bytes

    @property
    def copied_bytes(self) -> float:
        """Bytes that copies send in an optimizer step, all layers and ranks together, on average."""
        return float(self.copies_NL.sum(1).mean()) * self.costs.copy_bytes * self.costs.passes

    def migrating_checks(self, after: int = 0) -> float:
        """Share of the checks of a layer, from iteration ``after`` on, before which an expert changed its rank."""
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


def replay(trace: RoutingTrace, policy: Policy, costs: BalanceCosts, parts: int, stale: int = 10) -> Replay:
    """Plays a trace under a policy.

    Args:
        trace: Recorded or generated.
        policy: Decides.
        costs: Constants.
        parts: Ranks of ep.
        stale: Iterations by which the slow loop's loads are older than the check, at least.

    Raises:
        InputError: If ``parts`` is 1 or does not divide the experts.
    """
    check_parts(trace.experts, parts)
    trace = trace.for_sources(parts)
    n_, l_, _, e_ = trace.counts_NLSE.shape
    load_NLE = trace.counts_NLSE.sum(2)
    rows_NLR, part_NLE = np.zeros((n_, l_, parts), dtype=np.int64), np.zeros((n_, l_, e_), dtype=np.int16)
    copies_NL, moves_NL, pass_ps_NL, copy_ps_NL = (np.zeros((n_, l_), dtype=np.int64) for _ in range(4))
    move_ps_N = np.zeros(n_, dtype=np.int64)
    placements = [Placement.contiguous(e_, parts) for _ in range(l_)]
    shares = [np.zeros((parts, e_), dtype=np.int64) for _ in range(l_)]
    for n, iteration in enumerate(trace.iterations_N):
        known = int(np.searchsorted(trace.iterations_N, iteration - stale, side="right"))
        first = max(0, known - _HISTORY)
        now = replace(costs, horizon=_horizon(trace.iterations_N, first, known, n, costs))
        for layer in range(l_):
            old = np.asarray(placements[layer].part_of_expert)
            past_NE = load_NLE[first:known, layer]
            if known and policy.moves:
                placements[layer] = policy.place(past_NE, placements[layer], now)
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
    """A pattern is expected to last as long again as it has been seen, and no longer than the run."""
    if not known:
        return 0
    gap = _usual_gap(iterations_N)
    seen = int(iterations_N[known - 1] - iterations_N[first]) + gap
    return min(costs.horizon, seen, int(iterations_N[-1] - iterations_N[n]) + gap)


def check_parts(experts: int, parts: int) -> None:
    """Refuses numbers of ranks over which nothing can be balanced.

    Raises:
        InputError: If ``parts`` is 1 or does not divide the experts.
    """
    if parts < 2:
        raise InputError(f"ep={parts} leaves nothing to balance, every rank holds all experts; give at least 2.")
    if experts % parts:
        fit = [p for p in range(2, experts + 1) if experts % p == 0]
        raise InputError(f"{experts} experts do not go over ep={parts}; use ep in {', '.join(map(str, fit))}.")

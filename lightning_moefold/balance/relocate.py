# SPDX-License-Identifier: Apache-2.0
"""Which homes to give experts: the slow half of ``joint``. Pure Python and numpy.

What the fast half mends in each pass is no reason to move. So a placement is judged by the predicted time of passes *after*
their copies, over the loads of several past intervals: copies that it saves, and what copies cannot mend. Candidates keep
every expert where it is if there it fits under a level; an expert with more rows than the level fills its home, and whole
further ranks are kept free for its copies.

A candidate is taken where it gains more than the margin in every recent interval, and pays for the moves within the horizon.
And it must be foreseeable: made one interval earlier, in the same way, it must have gained in the latest interval. What is
not, as in the first steps of training and where hot experts change all the time, is left to copies. With a margin of zero all
this is left out: experts move whenever the latest interval would have been faster.

Legend: R ranks of ep, E experts, N past intervals.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightning_moefold.balance.assignment import Counts
from lightning_moefold.balance.costs import BalanceCosts
from lightning_moefold.balance.fill import Layout
from lightning_moefold.balance.packing import greedy_parts, placed
from lightning_moefold.balance.placement import Placement
from lightning_moefold.balance.predict import predicted

#: Intervals that a placement is judged by at most, and at least.
_MOST, _LEAST = 8, 4
#: Levels above the mean (in parts of 64) for which candidates are made.
_LEVELS = (0, 1, 4)
#: A move must save so many times what it takes: forecasts are wrong at times.
_SAFETY = 2
#: So many moves are tried to be taken back.
_MOST_TRIES = 32
#: Levels of a bound, in parts of 64 of the mean.
_BOUNDS = (65, 66, 68, 72, 80, 96, 128, 192)


def relocated(
    load_NE: Counts, current: Placement, costs: BalanceCosts, slots: int, offered: Sequence[Placement] = ()
) -> Placement:
    """The placement to go on with; ``current`` where no candidate is worth its moves.

    Args:
        load_NE: Past loads, the latest last.
        current: The placement now.
        costs: Constants, horizon and margin among them.
        slots: Copies that a rank may hold.
        offered: Further candidates, known before the run (:mod:`.pool`): these need not be foreseen.
    """
    eager = costs.margin_ppm == 0
    if len(load_NE) < (1 if eager else _LEAST) or not load_NE[-1].sum():
        return current
    here_E, parts = np.asarray(current.part_of_expert), current.parts
    judge = _Judge(load_NE[-_MOST:], here_E, parts, costs, slots)
    if not eager and not judge.could_gain():
        return current
    load_E = predicted(load_NE)
    made = candidates_for(load_E, here_E, costs, parts)
    known = [np.asarray(placement.part_of_expert) for placement in offered]
    if eager:
        best_E = max(made + known, key=judge.latest_gain)
        return placed(best_E, current) if judge.latest_gain(best_E) else current
    worth = []
    best = max(range(len(made)), key=lambda i: judge.latest_gain(made[i]))
    if judge.latest_gain(made[best]) and judge.is_clear(made[best]):
        older_E = _candidate(predicted(load_NE[:-1]), here_E, costs, parts, best)
        part_E = judge.with_fewer_moves(made[best], load_E)
        worth += [part_E] if judge.latest_gain(older_E) and judge.pays(part_E) else []
    for known_E in known:
        if judge.latest_gain(known_E) and judge.is_clear(known_E):
            part_E = judge.with_fewer_moves(known_E, load_E)
            worth += [part_E] if judge.pays(part_E) else []
    return placed(max(worth, key=judge.worth), current) if worth else current


class _Judge:
    """Gains of placements over the present one, in picoseconds of a pass after copies, over recent intervals."""

    def __init__(self, load_NE: Counts, here_E: Counts, parts: int, costs: BalanceCosts, slots: int) -> None:
        self.load_NE, self.here_E, self.parts, self.costs, self.slots = load_NE, here_E, parts, costs, slots
        self._known: dict[tuple[int, bytes], int] = {}

    def _score(self, interval: int, part_E: Counts) -> int:
        key = (interval, part_E.tobytes())
        if key not in self._known:
            rows_E = self.load_NE[interval]
            layout = Layout(rows_E.tolist(), part_E.tolist(), self.parts, self.costs, self.slots)
            self._known[key] = layout.score(layout.best_copies())
        return self._known[key]

    def _above_margin(self, gain: int, of: int) -> bool:
        return gain > 0 and gain * 1_000_000 > self.costs.margin_ppm * of

    def could_gain(self) -> bool:
        """Whether the best that any placement allows would be worth moving two experts."""
        now = self._score(len(self.load_NE) - 1, self.here_E)
        gain = now - least_score(self.load_NE[-1], self.parts, self.costs)
        return self._above_margin(gain, now) and self._outweighs(gain, 2 * self.costs.near_move_ps)

    def _gain(self, interval: int, part_E: Counts) -> int:
        """In one interval; 0 where that is below the margin."""
        now = self._score(interval, self.here_E)
        gain = now - self._score(interval, part_E)
        return gain if self._above_margin(gain, now) else 0

    def latest_gain(self, part_E: Counts) -> int:
        """In the latest interval; 0 where that is below the margin."""
        return self._gain(len(self.load_NE) - 1, part_E)

    def is_clear(self, part_E: Counts) -> bool:
        """Whether it gains more than the margin in every interval."""
        return all(self._gain(n, part_E) for n in reversed(range(len(self.load_NE))))

    def pays(self, part_E: Counts) -> bool:
        """Whether it is worth its moves, and still gains more than the margin."""
        if not self.is_clear(part_E):
            return False
        intervals = range(len(self.load_NE))
        mean = sum(self._gain(n, part_E) for n in intervals) // len(intervals)
        return self._outweighs(mean, self._move(part_E))

    def _outweighs(self, gain: int, move: int) -> bool:
        return gain * self.costs.passes * self.costs.horizon > _SAFETY * move

    def _move(self, part_E: Counts) -> int:
        return self.costs.move_ps(self.here_E.tolist(), part_E.tolist(), self.parts)

    def with_fewer_moves(self, part_E: Counts, load_E: Counts) -> Counts:
        """Takes moves back, the smallest experts first, where that is worth it in the latest interval.

        An expert goes home again in exchange for the one there whose load is nearest to its own.
        """
        best_E, best, tries = part_E, self.worth(part_E), 0
        for expert in np.argsort(load_E, kind="stable").tolist():
            home, away = int(self.here_E[expert]), int(best_E[expert])
            guests = [e for e in np.flatnonzero(best_E == home).tolist() if self.here_E[e] != home]
            if home == away or not guests or tries == _MOST_TRIES:
                continue
            guest = min(guests, key=lambda e: (abs(int(load_E[e]) - int(load_E[expert])), e))
            tried_E = best_E.copy()
            tried_E[expert], tried_E[guest] = home, away
            tries += 1
            worth = self.worth(tried_E)
            if worth >= best:
                best_E, best = tried_E, worth
        return best_E

    def worth(self, part_E: Counts) -> int:
        """Picoseconds that a placement would have saved within the horizon, moves paid, by the latest interval."""
        last = len(self.load_NE) - 1
        gain = self._score(last, self.here_E) - self._score(last, part_E)
        return gain * self.costs.passes * self.costs.horizon - _SAFETY * self._move(part_E)


def candidates_for(load_E: Counts, here_E: Counts, costs: BalanceCosts, parts: int) -> list[Counts]:
    """A placement for each level above the mean, and last the greedy packing, which relies on no copy."""
    return [_candidate(load_E, here_E, costs, parts, number) for number in range(len(_LEVELS) + 1)]


def _candidate(load_E: Counts, here_E: Counts, costs: BalanceCosts, parts: int, number: int) -> Counts:
    if number == len(_LEVELS):
        return greedy_parts(load_E, here_E, parts)
    total = int(load_E.sum())
    return settled(load_E, here_E, costs, parts, -(-total // parts) + total * _LEVELS[number] // (64 * parts))


def least_score(rows_E: Counts, parts: int, costs: BalanceCosts) -> int:
    """No placement's score is less, whatever is copied.

    If the busiest rank takes t rows, an expert with more is computed by ``ceil(rows / t)`` ranks, of which one is its home. The
    others are copies that its home sends. Between two levels, rows are those of the lower and copies those of the upper one.
    """
    total = int(rows_E.sum())
    level = -(-total // parts)
    best = -1
    for sixty_fourths in (*_BOUNDS, 64 * parts):
        upper = max(level, total * sixty_fourths // (64 * parts))
        copies_E = np.maximum(-(-rows_E // upper) - 1, 0) if upper else np.zeros_like(rows_E)
        copies, most = int(copies_E.sum()), int(copies_E.max())
        price = most * costs.near_copy_ps + copies * costs.near_copy_ps // parts + (costs.exchange_ps if copies else 0)
        score = level * costs.row_ps + price
        best = score if best < 0 else min(best, score)
        level = upper
    return best


def settled(load_E: Counts, here_E: Counts, costs: BalanceCosts, parts: int, level: int) -> Counts:
    """Rank of each expert such that few copies bring all ranks to ``level``, and few experts move.

    Args:
        load_E: Predicted rows.
        here_E: Rank of each expert now.
        costs: Which ranks share a node: copies of an expert stay in that of its home if they can.
        parts: R.
        level: Rows that a rank is to compute at most.
    """
    places = len(load_E) // parts
    room, free = [level] * parts, [places] * parts
    part_E = here_E.copy()
    order = np.argsort(-load_E, kind="stable").tolist()
    stays = np.bincount(here_E, np.where(load_E > level, 0, load_E), parts).tolist()
    for expert in order:
        rows, here = int(load_E[expert]), int(here_E[expert])
        if rows > level:
            home = here if free[here] and room[here] == level else _emptiest(room, free, stays)
            rows = _fill_whole_ranks(rows, home, level, room, stays, costs)
        elif free[here] and rows <= room[here]:
            home = here
        else:
            fits = [p for p in range(parts) if free[p] and room[p] >= rows]
            home = max(fits, key=lambda p: room[p]) if fits else _emptiest(room, free, stays)
        part_E[expert] = home
        free[home] -= 1
        room[home] -= min(rows, level)
        if int(load_E[expert]) <= level:
            stays[here] -= int(load_E[expert])
    return part_E


def _fill_whole_ranks(rows: int, home: int, level: int, room: list[int], stays: list[int], costs: BalanceCosts) -> int:
    """Keeps ranks free for the copies of an expert with more rows than a rank takes; returns the rows left for its home."""
    while rows > level:
        others = [p for p in range(len(room)) if p != home and room[p] == level]
        if not others:
            break
        helper = min(others, key=lambda p: (costs.node(p) != costs.node(home), stays[p], p))
        room[helper] = 0
        rows -= level
    return rows


def _emptiest(room: list[int], free: list[int], stays: list[int]) -> int:
    return min((p for p in range(len(room)) if free[p]), key=lambda p: (-room[p], stays[p], p))

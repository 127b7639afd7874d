# SPDX-License-Identifier: Apache-2.0
"""Chooses the experts to copy for one pass from exact rows: the fast half of the policy ``joint``.

Pure Python, because lists are faster than arrays for a few dozen numbers.

Ranks above a level hand rows to ranks below it, one expert for each pair of ranks. With R ranks, R - 1 copies reach exact
balance whatever the loads (McNaughton's wrap-around rule, in a line of ranks): a helper is always filled to the level, even
where that takes its donor below the level, for the donor then is one more rank to be filled; the last donor, the one with the
most to give, fills what is left. Where the level is above the mean there is slack, and donors need not go below it, which
saves copies. So a few levels are tried, and some between the best and the next below; the plan with the best predicted time
is kept, without those copies that do not make it better.

Legend: R ranks of ep, E experts.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

from lightning_moefold.balance.assignment import Counts, at_home
from lightning_moefold.balance.costs import BalanceCosts

#: Levels to try, as 64ths above the mean.
_LEVELS = (0, 1, 2, 4, 8, 12, 16, 24, 32, 64)
#: So often the interval below the best of them is halved.
_HALVINGS, _HALVINGS_OF_MANY = 4, 1
#: Above so many ranks, fewer are.
_MANY, _LEVELS_OF_MANY = 24, (0, 8)


class Copy(NamedTuple):
    """Rows of an expert that are computed by a rank other than its home."""

    expert: int
    owner: int
    helper: int
    rows: int


class Layout:
    """Searches for the best copies, given the rows of each expert.

    Args:
        rows: Rows of each expert.
        owner: Home rank of each expert.
        parts: Number of ranks, R.
        costs: Constants of the prediction.
        slots: Number of experts that a rank may compute besides its own.
    """

    def __init__(self, rows: Sequence[int], owner: Sequence[int], parts: int, costs: BalanceCosts, slots: int) -> None:
        self.parts, self.costs, self.slots = parts, costs, slots
        self.load, self.active = [0] * parts, [0] * parts
        self.experts: list[list[tuple[int, int]]] = [[] for _ in range(parts)]
        for expert, (n, part) in enumerate(zip(rows, owner, strict=True)):
            if n:
                self.load[part] += n
                self.active[part] += 1
                self.experts[part].append((n, expert))
        self.total = sum(self.load)
        self.node = [costs.node(part) for part in range(parts)]
        size = costs.parts_per_node
        self.nodes = [range(first, min(first + size, parts)) for first in range(0, parts, size)]

    def best_copies(self) -> list[Copy]:
        """Returns the copies of the best plan found; empty if no copy saves time."""
        best: list[Copy] = []
        best_far, least = True, self.score(best)
        mean, most = -(-self.total // self.parts), max(self.load)
        if not self.slots or not _can_pay(most, mean, self.parts, self.costs):
            return best
        reaches, many = self._reaches(mean), self.parts > _MANY
        lower, between = mean, (mean, mean)
        for sixty_fourths in _LEVELS_OF_MANY if many else _LEVELS:
            level = mean + self.total * sixty_fourths // (64 * self.parts)
            if level >= most:
                break
            scores = []
            for far in reaches:
                copies = self.filled(level, far)
                scores.append((self.score(copies), far))
                if scores[-1][0] < least:
                    best, least, between, best_far = copies, scores[-1][0], (lower, level), far
            lower = level
            if many:
                reaches = (min(scores)[1],)
        if not best:
            return best
        low, high = between
        for _ in range(_HALVINGS_OF_MANY if many else _HALVINGS):
            level = (low + high) // 2
            copies = self.filled(level, best_far)
            score = self.score(copies)
            if score < least:
                best, least, high = copies, score, level
            else:
                low = level
        return self.pruned(best)

    def _reaches(self, mean: int) -> tuple[bool, ...]:
        """Returns which kinds of copies to try: within nodes, and also between nodes if the busiest node has enough rows."""
        if not self.node[-1]:
            return (True,)
        busiest = max(-(-sum(self.load[p] for p in node) // len(node)) for node in self.nodes)
        return (False, True) if (busiest - mean) * self.costs.row_ps > self.costs.far_copy_ps else (False,)

    def score(self, copies: Sequence[Copy]) -> int:
        """Returns :attr:`.PassTime.score` of the assignment with these copies."""
        load, active = self.load.copy(), self.active.copy()
        out, into, price = [0] * self.parts, [0] * self.parts, 0
        for _, owner, helper, rows in copies:
            load[owner] -= rows
            load[helper] += rows
            active[helper] += 1
            price = self._price(owner, helper)
            out[owner] += price
            into[helper] += price
        row, product = self.costs.row_ps, self.costs.product_ps
        busiest = max(n * row + k * product for n, k in zip(load, active, strict=True))
        if not copies:
            return busiest
        return busiest + max(max(out), max(into)) + self.costs.exchange_ps + sum(out) // self.parts

    def _price(self, owner: int, helper: int) -> int:
        return self.costs.near_copy_ps if self.node[owner] == self.node[helper] else self.costs.far_copy_ps

    # ---- a plan for one level ----------------------------------------------------------------------------------

    def filled(self, level: int, far: bool) -> list[Copy]:
        """Returns copies that bring every rank to ``level`` if possible: within nodes first, then between nodes if ``far``.

        Without copies between nodes, a node whose mean is above the level is brought to its mean.
        """
        room, left = [level - n for n in self.load], [self.slots] * self.parts
        experts = [sorted(self.experts[p]) if self.load[p] > level else self.experts[p] for p in range(self.parts)]
        copies: list[Copy] = []
        for node in self.nodes if self.node[-1] else ():
            mean = -(-sum(self.load[p] for p in node) // len(node))
            if not far and mean > level:
                for p in node:
                    room[p] += mean - level
            _fill(node, room, left, experts, copies)
        if far:
            _fill(range(self.parts), room, left, experts, copies)
        return copies

    def pruned(self, copies: list[Copy]) -> list[Copy]:
        """Drops copies without which the score is no worse, the smallest copies first."""
        row, product, parts = self.costs.row_ps, self.costs.product_ps, self.parts
        work = [n * row + k * product for n, k in zip(self.load, self.active, strict=True)]
        out, into, traffic = [0] * parts, [0] * parts, 0
        for _, owner, helper, rows in copies:
            price = self._price(owner, helper)
            work[owner] -= rows * row
            work[helper] += rows * row + product
            out[owner] += price
            into[helper] += price
            traffic += price
        least, kept = self.score(copies), list(copies)
        for copy in sorted(copies, key=lambda copy: copy.rows):
            _, owner, helper, rows = copy
            price, back = self._price(owner, helper), rows * row
            if back > 2 * price + self.costs.exchange_ps:
                break
            work[owner] += back
            work[helper] -= back + product
            out[owner] -= price
            into[helper] -= price
            score = max(work)
            if len(kept) > 1:
                score += max(max(out), max(into)) + self.costs.exchange_ps + (traffic - price) // parts
            if score <= least:
                least, traffic = score, traffic - price
                kept.remove(copy)
            else:
                work[owner] -= back
                work[helper] += back + product
                out[owner] += price
                into[helper] += price
        return kept


def _fill(
    group: range, room: list[int], left: list[int], experts: list[list[tuple[int, int]]], copies: list[Copy]
) -> None:
    """Hands rows of ranks with negative room to ranks of the same group with room and a free slot; see the module."""
    donors = sorted((p for p in group if room[p] < 0), key=lambda p: -room[p])
    if not donors:
        return
    rooms = sorted((room[p], p) for p in group if room[p] > 0 and left[p])
    slack = sum(room[p] for p in group if room[p] < 0 or left[p])
    for donor in donors:
        own = experts[donor]
        while room[donor] < 0 and rooms and own:
            excess, most = -room[donor], own[-1][0]
            wanted = excess if excess < most else most
            place = bisect_left(rooms, (wanted, -1))
            if place == len(rooms):
                place -= 1
            space, helper = rooms[place]
            if place and space > most and space - wanted > slack and left[helper] == 1:
                place -= 1  # its only slot would be spent before it is full: rather fill a smaller one
                space, helper = rooms[place]
            del rooms[place]
            wasted = space - excess
            rows = excess if wasted >= 0 and (wasted <= slack or left[helper] > 1) else space
            index = bisect_left(own, (rows, -1))
            held, expert = own.pop(index if index < len(own) else -1)
            if held < rows:
                rows = held
            elif held > rows:
                insort(own, (held - rows, expert))
            copies.append(Copy(expert, donor, helper, rows))
            room[donor] += rows
            room[helper] -= rows
            left[helper] -= 1
            if room[helper] > 0:
                if left[helper]:
                    insort(rooms, (room[helper], helper))
                else:
                    slack -= room[helper]
        if room[donor] > 0 and left[donor]:
            insort(rooms, (room[donor], donor))


def _can_pay(most: int, mean: int, parts: int, costs: BalanceCosts) -> bool:
    """Whether the cheapest copy costs less than what copies can take off the busiest rank: its rows above the mean."""
    cheapest = costs.near_copy_ps + costs.exchange_ps + costs.near_copy_ps // parts
    return (most - mean) * costs.row_ps > cheapest


def plan_copies(rows_E: Counts, owner_E: Counts, parts: int, costs: BalanceCosts, slots: int) -> Counts:
    """Returns the assignment with the best predicted time found, ``[R, E]``.

    Args:
        rows_E: Rows of each expert.
        owner_E: Home rank of each expert.
        parts: Number of ranks, R.
        costs: Constants of the prediction.
        slots: Number of experts that a rank may compute besides its own.
    """
    quota_RE = at_home(rows_E, owner_E, parts)
    load_R = quota_RE.sum(1)
    if not _can_pay(int(load_R.max()), -(-int(load_R.sum()) // parts), parts, costs):
        return quota_RE
    for expert, owner, helper, rows in Layout(rows_E.tolist(), owner_E.tolist(), parts, costs, slots).best_copies():
        quota_RE[owner, expert] -= rows
        quota_RE[helper, expert] += rows
    return quota_RE

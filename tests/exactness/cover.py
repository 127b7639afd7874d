# SPDX-License-Identifier: Apache-2.0
"""Which factors meet in which case: a covering array, so that any two values of two factors meet somewhere."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any


def pairwise(factors: Mapping[str, Sequence[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Rows that cover every pair of values of every two factors; greedy, the same for the same seed."""
    names = list(factors)
    chance = random.Random(seed)
    open_pairs = {
        (a, i, b, j)
        for a, b in itertools.combinations(names, 2)
        for i in range(len(factors[a]))
        for j in range(len(factors[b]))
    }
    rows: list[dict[str, int]] = []
    while open_pairs:
        best: dict[str, int] = {}
        most = -1
        for _ in range(30):
            a, i, b, j = chance.choice(sorted(open_pairs))
            row = {a: i, b: j}
            for name in chance.sample(names, len(names)):
                if name not in row:
                    row[name] = chance.randrange(len(factors[name]))
            covered = sum(row[p] == q and row[r] == s for p, q, r, s in open_pairs)
            if covered > most:
                best, most = row, covered
        open_pairs = {p for p in open_pairs if not (best[p[0]] == p[1] and best[p[2]] == p[3])}
        rows.append(best)
    return [{name: factors[name][row[name]] for name in names} for row in rows]


def deal(rows: Sequence[dict[str, Any]], count: int, seed: int = 0) -> list[dict[str, Any]]:
    """``count`` rows: all of them again and again, each round in another order."""
    chance = random.Random(seed)
    dealt: list[dict[str, Any]] = []
    while len(dealt) < count:
        dealt += chance.sample(list(rows), len(rows))
    return dealt[:count]

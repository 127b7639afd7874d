# SPDX-License-Identifier: Apache-2.0
"""The best that small instances allow, by integer programming and by maximum flow."""

from __future__ import annotations

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

from lightning_moefold.balance.costs import BalanceCosts


class _Program:
    """Minimises c x subject to rows ``low <= a x <= high``."""

    def __init__(self, variables: int) -> None:
        self.c, self.rows, self.low, self.high = np.zeros(variables), [], [], []

    def add(self, terms: dict[int, float], low: float, high: float) -> None:
        row = np.zeros_like(self.c)
        for place, value in terms.items():
            row[place] += value
        self.rows.append(row)
        self.low.append(low)
        self.high.append(high)

    def solve(self, integral: np.ndarray, upper: np.ndarray) -> float:
        found = milp(
            self.c, constraints=LinearConstraint(np.array(self.rows), self.low, self.high), integrality=integral,
            bounds=Bounds(0, upper), options={"mip_rel_gap": 1e-6, "time_limit": 20},
        )  # fmt: skip
        assert found.status == 0, found.message
        return float(found.fun)


def least_score(rows_E: np.ndarray, owner_E: np.ndarray, parts: int, costs: BalanceCosts, slots: int) -> float:
    """Least ``PassTime.score`` of any assignment, in picoseconds, without the constant cost of an expert (product_ps = 0)."""
    experts, total = len(rows_E), int(rows_E.sum())
    size = parts * experts
    load, busy, some = 2 * size, 2 * size + 1, 2 * size + 2  # after quotas and copies
    program = _Program(2 * size + 3)

    def price(helper: int, e: int) -> int:
        return costs.copy_ps(int(owner_E[e]), helper) if owner_E[e] != helper else 0

    for e in range(experts):
        program.add({r * experts + e: 1 for r in range(parts)}, rows_E[e], rows_E[e])
    for r in range(parts):
        program.add({r * experts + e: 1 for e in range(experts)} | {load: -1}, -np.inf, 0)
        program.add({size + r * experts + e: 1 for e in range(experts) if owner_E[e] != r}, 0, slots)
        program.add({size + r * experts + e: price(r, e) for e in range(experts)} | {busy: -1}, -np.inf, 0)
        program.add(
            {size + h * experts + e: price(h, e) for h in range(parts) for e in range(experts) if owner_E[e] == r}
            | {busy: -1}, -np.inf, 0,
        )  # fmt: skip
        for e in range(experts):
            if owner_E[e] != r:
                program.add({r * experts + e: 1, size + r * experts + e: -float(rows_E[e])}, -np.inf, 0)
                program.add({size + r * experts + e: 1, some: -1}, -np.inf, 0)
                program.c[size + r * experts + e] = price(r, e) / parts
    program.c[load], program.c[busy], program.c[some] = costs.row_ps, 1, costs.exchange_ps
    # Quotas may be split anywhere: whole rows differ by less than one row.
    integral = np.concatenate([np.zeros(size), np.ones(size), [0, 0, 1]])
    upper = np.concatenate([np.full(size, total), np.ones(size), [total, np.inf, 1]])
    return program.solve(integral, upper)


def least_load(rows_E: np.ndarray, held_RE: np.ndarray) -> int:
    """Least possible rows of the busiest rank if each expert's rows may be on any rank that holds it: binary search on flows."""
    parts, experts = held_RE.shape
    low, high = -(-int(rows_E.sum()) // parts), int(rows_E.sum())
    while low < high:
        middle = (low + high) // 2
        graph = np.zeros((experts + parts + 2,) * 2, dtype=np.int32)
        graph[0, 2 : 2 + experts] = rows_E
        graph[2 : 2 + experts, 2 + experts :] = held_RE.T * rows_E[:, None]
        graph[2 + experts :, 1] = middle
        if maximum_flow(csr_array(graph), 0, 1).flow_value == rows_E.sum():
            high = middle
        else:
            low = middle + 1
    return low

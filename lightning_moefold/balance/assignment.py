# SPDX-License-Identifier: Apache-2.0
"""Assignments of experts' rows to ranks, and their cost. Pure numpy.

An assignment is a table ``quota_RE`` of int64: row r, column e says how many of expert e's rows rank r computes. Its column
sums are the expert's rows. A positive entry on a rank that is not the expert's home is a *copy*.

Legend: S source ranks, R ranks of ep, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lightning_moefold.balance.copies import Counts, at_home, copies_of
from lightning_moefold.balance.costs import BalanceCosts


def shared_out(rows_E: Counts, share_RE: Counts, owner_E: Counts) -> Counts:
    """Distributes rows of each expert in proportion to an assignment that was planned for other rows.

    Each rank gets the integer part of its share, and the ranks with the largest remainders get one more row (the lower
    rank first among equals). An expert without rows in the plan is computed at home.

    Args:
        rows_E: Rows of each expert to distribute.
        share_RE: The assignment that was planned for other rows.
        owner_E: Home rank of each expert.
    """
    planned_E = share_RE.sum(0)
    share_RE = np.where(planned_E > 0, share_RE, at_home(np.ones_like(rows_E), owner_E, len(share_RE)))
    planned_E = np.maximum(planned_E, 1)
    quota_RE, left_RE = np.divmod(share_RE * rows_E, planned_E)
    missing_E = rows_E - quota_RE.sum(0)
    order_RE = np.argsort(-left_RE, axis=0, kind="stable")
    place_RE = np.argsort(order_RE, axis=0, kind="stable")
    return quota_RE + (place_RE < missing_E)


@dataclass(frozen=True)
class PassTime:
    """Predicted picoseconds of one pass of a layer's experts.

    Args:
        compute: Time of the busiest rank's computation.
        exchange: Time in which copies travel, both ways; 0 without copies.
        traffic: Average time in which copies occupy a rank's link, for which other messages may have to wait.
    """

    compute: int
    exchange: int
    traffic: int

    @property
    def total(self) -> int:
        """Time of the pass in picoseconds."""
        return self.compute + self.exchange

    @property
    def score(self) -> int:
        """The value that planners minimise: the time, plus the traffic for which other messages may have to wait."""
        return self.total + self.traffic


def pass_time(quota_RE: Counts, owner_E: Counts, costs: BalanceCosts) -> PassTime:
    """Predicts the time of an assignment."""
    compute_R = quota_RE.sum(1) * costs.row_ps + (quota_RE > 0).sum(1) * costs.product_ps
    helpers, experts = np.nonzero(copies_of(quota_RE, owner_E))
    if not len(helpers):
        return PassTime(int(compute_R.max()), 0, 0)
    owners = owner_E[experts]
    near = owners // costs.parts_per_node == helpers // costs.parts_per_node
    price = np.where(near, costs.near_copy_ps, costs.far_copy_ps)
    parts = len(quota_RE)
    busiest = max(_sums(owners, price, parts).max(), _sums(helpers, price, parts).max())
    return PassTime(int(compute_R.max()), int(busiest) + costs.exchange_ps, int(price.sum()) // parts)


def _sums(where: Counts, values: Counts, parts: int) -> Counts:
    total = np.zeros(parts, dtype=np.int64)
    np.add.at(total, where, values)
    return total


def imbalance(quota_RE: Counts) -> float:
    """Returns the rows of the busiest rank divided by the mean; 1 without rows."""
    rows_R = quota_RE.sum(1)
    return float(rows_R.max() * len(rows_R) / rows_R.sum()) if rows_R.sum() else 1.0

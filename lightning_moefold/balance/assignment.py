# SPDX-License-Identifier: Apache-2.0
"""Rows of experts on ranks: what an assignment holds, and what it costs. Pure numpy.

An assignment is a table ``quota_RE`` of int64: row r, column e says how many of expert e's rows rank r computes. Its column
sums are the expert's rows. A positive entry on a rank that is not the expert's home is a *copy*.

Legend: S source ranks, R ranks of ep, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_moefold.balance.costs import BalanceCosts

Counts = NDArray[np.int64]


def at_home(rows_E: Counts, owner_E: Counts, parts: int) -> Counts:
    """The assignment without copies, ``[R, E]``."""
    quota_RE = np.zeros((parts, len(rows_E)), dtype=np.int64)
    quota_RE[owner_E, np.arange(len(rows_E))] = rows_E
    return quota_RE


def copies_of(quota_RE: Counts, owner_E: Counts) -> NDArray[np.bool_]:
    """Where an expert is copied to, ``[R, E]``."""
    held_RE = quota_RE > 0
    held_RE[owner_E, np.arange(quota_RE.shape[1])] = False
    return held_RE


def shared_out(rows_E: Counts, share_RE: Counts, owner_E: Counts) -> Counts:
    """Rows of each expert in proportion to an assignment that was planned for other rows.

    Each rank gets the whole part of its share, and the ranks with the largest remainders one row more (the lower rank first
    where they are equal). An expert that had no row then is computed at home.

    Args:
        rows_E: Rows that there are.
        share_RE: The assignment of other rows.
        owner_E: Home of each expert.
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
        compute: Of the busiest rank.
        exchange: In which copies travel, there and back; 0 without copies.
        traffic: What copies occupy of each rank's link on average: what other messages may have to wait for.
    """

    compute: int
    exchange: int
    traffic: int

    @property
    def total(self) -> int:
        """Picoseconds that the pass takes."""
        return self.compute + self.exchange

    @property
    def score(self) -> int:
        """What planners make small: the time, and the traffic that others may have to wait for."""
        return self.total + self.traffic


def pass_time(quota_RE: Counts, owner_E: Counts, costs: BalanceCosts) -> PassTime:
    """Predicted time of an assignment."""
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
    """Rows of the busiest rank over the mean; 1 without rows."""
    rows_R = quota_RE.sum(1)
    return float(rows_R.max() * len(rows_R) / rows_R.sum()) if rows_R.sum() else 1.0

# SPDX-License-Identifier: Apache-2.0
"""The simplest policy: the busiest rank gives rows of its hottest expert to the least busy rank. Pure numpy."""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_moefold.balance.copies import Counts, at_home


def greedy(counts_SE: Counts, owner_E: Counts, costs: Any, max_copies_per_rank: int) -> Counts:
    """Evens out the rows of the ranks, ignoring the cost of copies.

    The busiest rank gives rows of its hottest expert, as many as it has above the mean, to the least busy rank that may
    take a copy, as many as that rank is below the mean. This repeats until no rank can give or take.

    Args:
        counts_SE: Rows of each expert at each rank.
        owner_E: The rank that owns each expert.
        costs: Ignored.
        max_copies_per_rank: Maximum number of copies on a rank.

    Returns:
        The rows of each expert that each rank computes, ``[R, E]``.
    """
    ranks, rows_E = len(counts_SE), counts_SE.sum(0)
    quota_RE = at_home(rows_E, owner_E, ranks)
    load_R = quota_RE.sum(1)
    most = -(-int(rows_E.sum()) // ranks)
    free_R = np.full(ranks, max_copies_per_rank)
    while True:
        giver = int(load_R.argmax())
        taker = int(np.where(free_R > 0, load_R, np.iinfo(np.int64).max).argmin())
        expert = int(np.where(owner_E == giver, quota_RE[giver], 0).argmax())
        rows = min(int(load_R[giver]) - most, most - int(load_R[taker]), int(quota_RE[giver, expert]))
        if rows <= 0 or free_R[taker] == 0:
            return quota_RE
        free_R[taker] -= quota_RE[taker, expert] == 0
        quota_RE[giver, expert] -= rows
        quota_RE[taker, expert] += rows
        load_R[giver] -= rows
        load_R[taker] += rows

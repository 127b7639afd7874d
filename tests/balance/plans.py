# SPDX-License-Identifier: Apache-2.0
"""Plans of chance, the same on every rank and each time."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from lightning_moefold.balance.copies import CopyPlan, Counts, RowSplit, no_copies


def drawn(counts_SE: Counts, owner_E: Counts, costs: Any, max_copies_per_rank: int) -> Counts:
    """One to so many copies on each rank, each with some of the expert's rows: none, some, or all there are."""
    chance = np.random.default_rng(zlib.crc32(counts_SE.tobytes()))
    ranks, experts = counts_SE.shape
    quota_RE = no_copies(counts_SE, ranks)
    for rank in range(ranks):
        others = np.flatnonzero(owner_E != rank)
        copies = chance.integers(min(1, max_copies_per_rank), max_copies_per_rank + 1)
        for expert in chance.choice(others, min(len(others), copies), replace=False):
            left = quota_RE[owner_E[expert], expert]
            rows = left if chance.random() < 0.2 else chance.integers(left + 1)
            quota_RE[owner_E[expert], expert] -= rows
            quota_RE[rank, expert] += rows
    return quota_RE


def rows_of_plan(counts_SE: Counts, quota_RE: Counts) -> Counts:
    """Rows of each expert that go from each source to each rank, ``[S, R, E]``."""
    split = RowSplit(counts_SE, CopyPlan(quota_RE))
    return np.stack([split.sent(source) for source in range(len(counts_SE))])

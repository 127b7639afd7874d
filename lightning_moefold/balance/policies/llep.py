# SPDX-License-Identifier: Apache-2.0
"""LLEP, least-loaded expert parallelism (arXiv 2601.17111): what a rank cannot take spills to the least loaded others.

A rank takes ``alpha`` times the mean at most. Experts in falling load: what fits on the owner, beside what its other experts
still need, stays; the rest spills in parts, each to the least loaded rank that can take it whole or at least ``min_rows`` of
it, and where there is none to the least loaded rank, all of it. Below ``trigger`` (busiest expert over the mean) nothing
is done. The published defaults.

It sets no bound on copies; here a rank that holds ``max_copies_per_rank`` takes no further expert, and what no rank may take
stays at home.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lightning_moefold.balance.assignment import Counts, at_home
from lightning_moefold.balance.costs import BalanceCosts
from lightning_moefold.balance.policies.base import CopiesFrom, Policy


@dataclass(frozen=True)
class LLEP(Policy):
    """Copies experts by the exact counts; homes stay."""

    alpha: float = 1.0
    min_rows: int = 1024
    trigger: float = 1.3
    name: ClassVar[str] = "llep"
    _copies: ClassVar[CopiesFrom] = CopiesFrom.PASS

    def plan(self, counts_SE: Counts, owner_E: Counts, costs: BalanceCosts, max_copies_per_rank: int) -> Counts:
        """See :meth:`.Policy.plan`."""
        rows_E, parts = counts_SE.sum(0), len(counts_SE)
        if not rows_E.sum() or rows_E.max() * len(rows_E) < self.trigger * rows_E.sum():
            return at_home(rows_E, owner_E, parts)
        limit = int(np.ceil(self.alpha * rows_E.sum() / parts))
        pending = np.bincount(owner_E, rows_E, parts).astype(np.int64)
        assigned, copies = np.zeros(parts, dtype=np.int64), np.zeros(parts, dtype=np.int64)
        quota_RE = np.zeros((parts, len(rows_E)), dtype=np.int64)
        for expert in np.argsort(-rows_E, kind="stable"):
            owner, rows = owner_E[expert], int(rows_E[expert])
            if not rows:
                break
            pending[owner] -= rows
            stays = int(np.clip(limit - assigned[owner] - pending[owner], 0, rows))
            quota_RE[owner, expert] = stays
            assigned[owner] += stays
            spill = rows - stays
            while spill:
                free = np.flatnonzero((copies < max_copies_per_rank) | (quota_RE[:, expert] > 0))
                free = free[free != owner]
                if not len(free):
                    quota_RE[owner, expert] += spill
                    assigned[owner] += spill
                    break
                load = assigned + pending
                order = free[np.argsort(load[free], kind="stable")]
                fits = [(p, min(spill, int(limit - load[p]))) for p in order]
                helper, part = next(((p, c) for p, c in fits if c == spill or c >= self.min_rows), (order[0], spill))
                copies[helper] += quota_RE[helper, expert] == 0
                quota_RE[helper, expert] += part
                assigned[helper] += part
                spill -= part
        return quota_RE

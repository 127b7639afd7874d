# SPDX-License-Identifier: Apache-2.0
"""FasterMoE's shadow experts (He et al., PPoPP 2022): hot experts on every rank, for one pass.

A shadowed expert's weights go to all ranks, each computes its own rows on them, and the gradients are summed at home. Experts
are tried from the most rows on; with the first k of them shadowed, the busiest of the others and the local rows of the k
decide the time. The best prefix is taken, if it beats none. As in the SmartMoE artifact's version, in which rows are
summed over sources (FastMoE 1.1.0 sums the other axis, and never shadows).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lightning_moefold.balance.assignment import Counts, at_home
from lightning_moefold.balance.costs import BalanceCosts
from lightning_moefold.balance.policies.base import CopiesFrom, Policy


@dataclass(frozen=True)
class FasterMoEShadow(Policy):
    """Copies experts to all ranks by the exact counts; homes stay."""

    name: ClassVar[str] = "fastermoe_shadow"
    _copies: ClassVar[CopiesFrom] = CopiesFrom.PASS

    def plan(self, counts_SE: Counts, owner_E: Counts, costs: BalanceCosts, max_copies_per_rank: int) -> Counts:
        """See :meth:`.Policy.plan`."""
        parts = len(counts_SE)
        quota_RE = at_home(counts_SE.sum(0), owner_E, parts)
        best_RE, best = quota_RE, int(quota_RE.sum(1).max()) * costs.row_ps
        transfer = max(costs.copy_ps(0, parts - 1), costs.near_copy_ps)
        for shadows, expert in enumerate(np.argsort(-counts_SE.sum(0), kind="stable")[:max_copies_per_rank], 1):
            quota_RE = quota_RE.copy()
            quota_RE[:, expert] = counts_SE[:, expert]
            # A rank receives every shadow of others; they are sent one after the other.
            time = int(quota_RE.sum(1).max()) * costs.row_ps + shadows * transfer
            if time < best:
                best_RE, best = quota_RE, time
        return best_RE

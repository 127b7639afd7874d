# SPDX-License-Identifier: Apache-2.0
"""Copies that were planned from past loads, divided anew over the rows of each pass. Pure numpy.

Legend: R ranks of ep, E experts in the slots of a placement.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_moefold.balance.assignment import Counts, at_home, copies_of
from lightning_moefold.balance.placement import Placement
from lightning_moefold.balance.policies.base import Policy


@dataclass(frozen=True, eq=False)
class PastCopies:
    """A policy of copies (:data:`~.fast.FastPolicy`) whose copies stay the same until the next check.

    Args:
        policy: Divides the rows of a pass.
        share_RE: Rows of past loads that each rank was planned to compute, by slot; None for no copies yet.
    """

    policy: Policy
    share_RE: Counts | None = None

    def __call__(self, counts_SE: Counts, owner_E: Counts, costs: Any, max_copies_per_rank: int) -> Counts:
        """Divides the rows of a pass among the owner and the copies of each expert."""
        rows_E = counts_SE.sum(0)
        if self.share_RE is None:
            return at_home(rows_E, owner_E, len(counts_SE))
        return self.policy.divide(rows_E, _within(self.share_RE, owner_E, max_copies_per_rank), owner_E)

    @classmethod
    def of(cls, policy: Policy, share_RE: Counts, placement: Placement) -> PastCopies:
        """The copies that shares by logical number of the expert mean under a placement."""
        return cls(policy, share_RE[:, list(placement.expert_of_slot)])


def _within(share_RE: Counts, owner_E: Counts, most: int) -> Counts:
    """At most so many copies on each rank, the larger ones; a policy for inference counts experts at home among its own."""
    kept_RE = share_RE.copy()
    copied_RE = copies_of(share_RE, owner_E)
    for rank in np.flatnonzero(copied_RE.sum(1) > most):
        copied = np.flatnonzero(copied_RE[rank])
        dropped = copied[np.argsort(-share_RE[rank, copied], kind="stable")[most:]]
        kept_RE[owner_E[dropped], dropped] += kept_RE[rank, dropped]
        kept_RE[rank, dropped] = 0
    return kept_RE

# SPDX-License-Identifier: Apache-2.0
"""What a user says about copies for one pass, and what is counted of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_moefold.balance.copies import CopyPlan, Counts, owners
from lightning_moefold.balance.greedy import greedy
from lightning_moefold.errors import InputError

#: ``(counts_SE, owner_E, costs, max_copies_per_rank) -> quota_RE``, a function of its arguments alone: every rank asks it, and
#: recomputation asks it again.
FastPolicy = Callable[[Counts, Counts, Any, int], Counts]

FAST_POLICIES: dict[str, FastPolicy] = {"greedy": greedy}


@dataclass(frozen=True)
class ExpertCopies:
    """Copies of busy experts on other ranks, made anew in each pass of each layer.

    Args:
        policy: A name in :data:`FAST_POLICIES`, or a function ``(counts_SE, owner_E, costs, max_copies_per_rank) -> quota_RE``
            of int64 arrays: rows of each expert at each rank of ep, the rank at which each is at home, and rows of each
            expert that each rank is to compute. It must say the same on every rank and each time.
        max_copies_per_rank: Copies that a rank may have of a layer. Forward keeps them for backward.
        costs: What the policy is told of the machine: the same on every rank.

    Raises:
        InputError: For a policy that is not known, or no room for copies.
    """

    policy: str | FastPolicy = "greedy"
    max_copies_per_rank: int = 2
    costs: Any = None

    def __post_init__(self) -> None:
        if isinstance(self.policy, str) and self.policy not in FAST_POLICIES:
            known = " or ".join(map(repr, FAST_POLICIES))
            raise InputError(f"policy={self.policy!r} of expert copies is not available; use {known}, or a function.")
        if self.max_copies_per_rank < 1:
            raise InputError(
                f"max_copies_per_rank={self.max_copies_per_rank} leaves no room for copies; use at least 1, or no expert copies."
            )

    def plan(self, counts_SE: Counts, ranks: int) -> CopyPlan:
        """The plan of a pass.

        Args:
            counts_SE: Rows of each expert at each source; the sources of a rank beside each other.
            ranks: R.

        Raises:
            InputError: If the policy plans what cannot be.
        """
        policy = FAST_POLICIES[self.policy] if isinstance(self.policy, str) else self.policy
        counts_RE = counts_SE.reshape(ranks, -1, counts_SE.shape[1]).sum(1)
        quota_RE = policy(counts_RE, owners(counts_SE.shape[1], ranks), self.costs, self.max_copies_per_rank)
        plan = CopyPlan(np.asarray(quota_RE, dtype=np.int64))
        name = self.policy if isinstance(self.policy, str) else getattr(policy, "__name__", type(policy).__name__)
        plan.check(counts_RE, self.max_copies_per_rank, name)
        return plan


@dataclass
class CopyCounter:
    """What the copies of a layer were in training since somebody last made this anew; the same on all ranks of ep and etp.

    Attributes:
        passes: Of the layer.
        copies: Made on all ranks of ep.
        rows: Computed by copies.
        bytes: That weights took to copies and gradients back, on all ranks of ep.
        busiest_home: Sum over passes of the busiest rank's rows, had every expert computed at home.
        busiest: The same with the copies.
        mean: The same of an average rank.
    """

    passes: int = 0
    copies: int = 0
    rows: int = 0
    bytes: int = 0
    busiest_home: int = 0
    busiest: int = 0
    mean: float = 0.0

    def count(self, plan: CopyPlan, bytes_of_copy: int) -> None:
        """Adds a pass.

        Args:
            plan: Of the pass.
            bytes_of_copy: That one copy takes, both ways together.
        """
        rows_E = plan.quota_RE.sum(0)
        self.passes += 1
        self.copies += plan.copies
        self.rows += plan.moved_rows
        self.bytes += plan.copies * bytes_of_copy
        self.busiest_home += int(rows_E.reshape(plan.ranks, -1).sum(1).max())
        self.busiest += int(plan.quota_RE.sum(1).max())
        self.mean += float(rows_E.sum()) / plan.ranks

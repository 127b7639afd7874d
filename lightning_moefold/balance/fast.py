# SPDX-License-Identifier: Apache-2.0
"""User settings of copies for one pass, and their counters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lightning_moefold.arguments import check_count
from lightning_moefold.balance.copies import CopyPlan, Counts, owners
from lightning_moefold.balance.greedy import greedy
from lightning_moefold.errors import InputError

#: ``(counts_SE, owner_E, costs, max_copies_per_rank) -> quota_RE``, a function of its arguments alone: every rank asks it, and
#: recomputation asks it again.
FastPolicy = Callable[[Counts, Counts, Any, int], Counts]

#: Policies of :mod:`.policies` that plan copies from the rows of a pass, and the one of :mod:`.greedy`.
FAST_POLICIES = ("joint", "greedy", "llep", "fastermoe_shadow")


@dataclass(frozen=True)
class ExpertCopies:
    """Copies of busy experts on other ranks, planned again in each pass of each layer.

    Args:
        policy: A name in :data:`FAST_POLICIES`, or a function ``(counts_SE, owner_E, costs, max_copies_per_rank) -> quota_RE``
            of int64 arrays: rows of each expert at each rank of ep, the owner of each expert, and rows of each expert
            that each rank computes. Its result must be the same on every rank and in every call.
        max_copies_per_rank: Maximum number of copies per layer on a rank. Forward keeps them for backward.
        costs: Description of the machine for the policy; it must be the same on every rank.

    Raises:
        InputError: If the policy is unknown, or no copy is allowed.
    """

    policy: str | FastPolicy = "joint"
    max_copies_per_rank: int = 2
    costs: Any = None

    def __post_init__(self) -> None:
        if isinstance(self.policy, str) and self.policy not in FAST_POLICIES:
            known = ", ".join(map(repr, FAST_POLICIES))
            raise InputError(
                f"policy={self.policy!r} of expert copies is not available; use one of {known}, or a function."
            )
        check_count("max_copies_per_rank", self.max_copies_per_rank, least=0)
        if self.max_copies_per_rank < 1:
            raise InputError(
                f"max_copies_per_rank={self.max_copies_per_rank} leaves no room for copies; use at least 1, or no expert copies."
            )

    def priced(self, device_type: str, weights: int, ranks: int) -> ExpertCopies:
        """The same with costs: those given, or else what is assumed of a kind of device.

        Args:
            device_type: ``"cpu"`` or ``"cuda"``.
            weights: Numbers of an expert with which a rank computes; the same on every rank.
            ranks: R.
        """
        if self.costs is not None or not isinstance(self.policy, str):
            return self
        from lightning_moefold.balance.costs import BalanceCosts  # the planner's machine model, which knows this floor

        return replace(self, costs=BalanceCosts.assumed(device_type, weights, parts=ranks))

    def _function(self) -> FastPolicy:
        if not isinstance(self.policy, str):
            return self.policy
        if self.policy == "greedy":
            return greedy
        from lightning_moefold.balance.policies import make_policy

        return make_policy(self.policy).plan

    def plan(self, counts_SE: Counts, ranks: int) -> CopyPlan:
        """Plans a pass.

        Args:
            counts_SE: Rows of each expert at each source, with the sources of a rank adjacent.
            ranks: Number of ranks, R.

        Raises:
            InputError: If the plan of the policy is invalid.
        """
        policy = self._function()
        counts_RE = counts_SE.reshape(ranks, -1, counts_SE.shape[1]).sum(1)
        quota_RE = policy(counts_RE, owners(counts_SE.shape[1], ranks), self.costs, self.max_copies_per_rank)
        plan = CopyPlan(np.asarray(quota_RE, dtype=np.int64))
        if not isinstance(self.policy, str):  # ours need no check in every pass
            plan.check(counts_RE, self.max_copies_per_rank, getattr(policy, "__name__", type(policy).__name__))
        return plan


@dataclass
class CopyCounter:
    """Counters of a layer's copies in training since its last reset; the same on all ranks of ep and etp.

    Attributes:
        passes: Number of passes of the layer.
        copies: Number of copies on all ranks of ep.
        rows: Number of rows computed by copies.
        bytes: Bytes of weights sent to copies and of gradients sent back, on all ranks of ep.
        busiest_home: Busiest rank's rows if owners computed all rows, summed over passes.
        busiest: Busiest rank's rows with copies, summed over passes.
        mean: Rows of an average rank, summed over passes.
        gained_R: Rows that each rank computes more than without copies (fewer: negative), summed over passes; None before the
            first.
    """

    passes: int = 0
    copies: int = 0
    rows: int = 0
    bytes: int = 0
    busiest_home: int = 0
    busiest: int = 0
    mean: float = 0.0
    gained_R: Counts | None = field(default=None, compare=False)

    def count(self, plan: CopyPlan, bytes_of_copy: int) -> None:
        """Counts a pass.

        Args:
            plan: Plan of the pass.
            bytes_of_copy: Bytes sent for one copy, both ways together.
        """
        rows_E = plan.quota_RE.sum(0)
        self.passes += 1
        self.copies += plan.copies
        self.rows += plan.moved_rows
        self.bytes += plan.copies * bytes_of_copy
        home_R, rows_R = rows_E.reshape(plan.ranks, -1).sum(1), plan.quota_RE.sum(1)
        self.busiest_home += int(home_R.max())
        self.busiest += int(rows_R.max())
        self.gained_R = rows_R - home_R + (0 if self.gained_R is None else self.gained_R)
        self.mean += float(rows_E.sum()) / plan.ranks

# SPDX-License-Identifier: Apache-2.0
"""Ours: homes and copies decided together, each with its price.

Fast: a copy is made where the predicted time of the busiest rank falls by more than the copy costs (:mod:`..fill`). Slow: an
expert moves for what copies would go on paying for, or cannot mend (:mod:`..relocate`). Either half can be switched off; with
``fast=False`` copies are planned by the same rule from past loads, so that they can travel before the counts are known, and only
their rows follow from the counts (:mod:`..split`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lightning_moefold.balance.assignment import Counts
from lightning_moefold.balance.costs import BalanceCosts
from lightning_moefold.balance.fill import plan_copies
from lightning_moefold.balance.placement import Placement
from lightning_moefold.balance.policies.base import CopiesFrom, Policy
from lightning_moefold.balance.predict import of_a_pass, predicted
from lightning_moefold.balance.relocate import relocated
from lightning_moefold.balance.split import split_exactly


@dataclass(frozen=True)
class Joint(Policy):
    """Moves homes by past loads, and copies by exact counts.

    Args:
        fast: Plan copies in each pass; False plans them from past loads.
        slow: Move homes.
    """

    fast: bool = True
    slow: bool = True
    name: ClassVar[str] = "joint"
    moves: ClassVar[bool] = True

    @property
    def copies(self) -> CopiesFrom:
        """What its copies are planned from."""
        return CopiesFrom.PASS if self.fast else CopiesFrom.PAST

    def place(self, load_NE: Counts, current: Placement, costs: BalanceCosts) -> Placement:
        """See :meth:`.Policy.place`."""
        return self.choose(load_NE, current, costs)

    def choose(
        self, load_NE: Counts, current: Placement, costs: BalanceCosts, offered: Sequence[Placement] = ()
    ) -> Placement:
        """See :meth:`.Policy.choose`; what is offered is judged like every candidate."""
        if not self.slow:
            return current
        return relocated(of_a_pass(load_NE, costs), current, costs, self.max_copies_per_rank, offered)

    def replicas(self, load_NE: Counts, held_RE: Counts, owner_E: Counts, costs: BalanceCosts) -> Counts:
        """See :meth:`.Policy.replicas`."""
        load_E = predicted(of_a_pass(load_NE, costs))
        return plan_copies(load_E, owner_E, len(held_RE), costs.known_early(), self.max_copies_per_rank)

    def divide(self, rows_E: Counts, share_RE: Counts, owner_E: Counts) -> Counts:
        """See :meth:`.Policy.divide`."""
        return split_exactly(rows_E, share_RE, owner_E)

    def plan(self, counts_SE: Counts, owner_E: Counts, costs: BalanceCosts, max_copies_per_rank: int) -> Counts:
        """See :meth:`.Policy.plan`."""
        return plan_copies(counts_SE.sum(0), owner_E, len(counts_SE), costs, max_copies_per_rank)

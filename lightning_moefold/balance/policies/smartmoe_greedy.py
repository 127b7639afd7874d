# SPDX-License-Identifier: Apache-2.0
"""SmartMoE's live placement (Zhai et al., USENIX ATC 2023): the busiest expert to the least loaded rank, and so on.

As its published code decides: a tie leaves an expert where it is, and the new placement is taken whenever its busiest rank
has less to do, however little. Neither what moving costs nor the order of slots within a rank counts there; here slots that
need not change do not (the code's own numbering would move experts within their rank as well).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lightning_moefold.balance.assignment import Counts
from lightning_moefold.balance.costs import BalanceCosts
from lightning_moefold.balance.packing import greedy_parts, placed
from lightning_moefold.balance.placement import Placement
from lightning_moefold.balance.policies.base import Policy

#: Intervals whose loads are added up: the code records the last two iterations before a decision.
_WINDOW = 2


@dataclass(frozen=True)
class SmartMoEGreedy(Policy):
    """Moves homes by past loads; no copies."""

    name: ClassVar[str] = "smartmoe_greedy"
    moves: ClassVar[bool] = True

    def place(self, load_NE: Counts, current: Placement, costs: BalanceCosts) -> Placement:
        """See :meth:`.Policy.place`."""
        load_E = load_NE[-_WINDOW:].sum(0)
        here_E = np.asarray(current.part_of_expert)
        new_E = greedy_parts(load_E, here_E, current.parts)
        before, after = (np.bincount(parts_E, load_E, current.parts).max() for parts_E in (here_E, new_E))
        return placed(new_E, current) if before > after else current

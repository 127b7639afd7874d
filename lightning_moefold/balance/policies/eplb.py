# SPDX-License-Identifier: Apache-2.0
"""DeepSeek's EPLB (deepseek-ai/EPLB, its global form): replicas of busy experts, packed evenly on ranks, by past loads.

Replicas: each extra one goes to the expert with the largest load for each replica that it has. Packing: replicas in falling
load, each to the least loaded rank that has a slot left; every rank has the same number of slots. A router sends equally many
rows to each replica.

Written for inference, where all replicas are alike. In training one of them is the expert's home and has its optimizer's
state: the one where it is now, else one such that every rank is home to as many. Two replicas that it packs on one rank
are one here, with twice the share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lightning_moefold.balance.assignment import Counts
from lightning_moefold.balance.costs import BalanceCosts
from lightning_moefold.balance.packing import placed
from lightning_moefold.balance.placement import Placement
from lightning_moefold.balance.policies.base import CopiesFrom, Policy


@dataclass(frozen=True)
class EPLB(Policy):
    """Moves homes and plans copies by past loads; ``max_copies_per_rank`` replicas a rank besides its experts."""

    name: ClassVar[str] = "eplb"
    moves: ClassVar[bool] = True
    _copies: ClassVar[CopiesFrom] = CopiesFrom.PAST

    def place(self, load_NE: Counts, current: Placement, costs: BalanceCosts) -> Placement:
        """See :meth:`.Policy.place`."""
        replicas_RE = pack_replicas(load_NE[-1], current.parts, self.max_copies_per_rank)
        part_E = homes(replicas_RE, np.asarray(current.part_of_expert))
        return current if (part_E == np.asarray(current.part_of_expert)).all() else placed(part_E, current)

    def replicas(self, load_NE: Counts, held_RE: Counts, owner_E: Counts, costs: BalanceCosts) -> Counts:
        """See :meth:`.Policy.replicas`: an equal share for each replica."""
        replicas_RE = pack_replicas(load_NE[-1], len(held_RE), self.max_copies_per_rank)
        even_E = np.maximum(load_NE[-1], 1)
        return replicas_RE * even_E


def pack_replicas(load_E: Counts, parts: int, extra_per_rank: int) -> Counts:
    """How many replicas of each expert each rank holds, ``[R, E]``."""
    experts = len(load_E)
    count = [1] * experts
    load = [int(rows) for rows in load_E]
    for _ in range(parts * extra_per_rank):
        busiest = max(range(experts), key=lambda e: (load[e] / count[e], -e))
        count[busiest] += 1
    items = sorted(((load[e] / count[e], -e) for e in range(experts) for _ in range(count[e])), reverse=True)
    room, packed = [experts // parts + extra_per_rank] * parts, [0.0] * parts
    replicas_RE = np.zeros((parts, experts), dtype=np.int64)
    for rows, negative in items:
        part = min((p for p in range(parts) if room[p]), key=lambda p: packed[p])
        replicas_RE[part, -negative] += 1
        room[part] -= 1
        packed[part] += rows
    return replicas_RE


def homes(held_RE: Counts, here_E: Counts) -> Counts:
    """A home for each expert among its holders, equally many on every rank, and where it is already if it can be.

    Alternating paths match experts with places; an expert for which there is none (a rank may hold two replicas of one) goes
    where a place is left.
    """
    parts, experts = held_RE.shape
    places = experts // parts
    living: list[list[int]] = [[] for _ in range(parts)]
    home = [-1] * experts

    def settle(expert: int, seen: set[int]) -> bool:
        choices = sorted(np.flatnonzero(held_RE[:, expert]).tolist(), key=lambda p: (p != here_E[expert], p))
        for part in choices:
            if part in seen:
                continue
            seen.add(part)
            if len(living[part]) < places or any(settle_elsewhere(other, part, seen) for other in list(living[part])):
                living[part].append(expert)
                home[expert] = part
                return True
        return False

    def settle_elsewhere(expert: int, part: int, seen: set[int]) -> bool:
        if settle(expert, seen):
            living[part].remove(expert)
            return True
        return False

    stays_first = sorted(range(experts), key=lambda e: (not held_RE[here_E[e], e], e))
    lost = [expert for expert in stays_first if not settle(expert, set())]
    for expert in lost:
        free = [p for p in range(parts) if len(living[p]) < places]
        part = int(here_E[expert]) if here_E[expert] in free else free[0]
        living[part].append(expert)
        home[expert] = part
    return np.asarray(home, dtype=np.int64)

# SPDX-License-Identifier: Apache-2.0
"""FlexMoE (Nie et al., SIGMOD 2023): slots of virtual experts that are handed from cold experts to hot ones, step by step.

It has no published code; this follows the paper's three steps as the authors of LAER-MoE describe them. *Expand*: the expert
with the most rows for each of its replicas gets one more, on the least loaded rank with a slot. *Shrink*: without a free
slot, the expert with the fewest rows for each replica gives one up. *Migrate*: where the slot so won is on a rank that holds
the hot expert already, another copy changes its rank to make room elsewhere. A step is taken while the predicted time
falls, at most ten in a decision. Replicas share an expert's rows equally. The replica at home has the optimizer's state and
is never given up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from lightning_moefold.balance.assignment import Counts, pass_time
from lightning_moefold.balance.costs import BalanceCosts
from lightning_moefold.balance.policies.base import CopiesFrom, Policy, even_split

_ROUNDS = 10


@dataclass(frozen=True)
class FlexMoE(Policy):
    """Plans copies by past loads, changing few at a time; homes stay."""

    name: ClassVar[str] = "flexmoe"
    _copies: ClassVar[CopiesFrom] = CopiesFrom.PAST

    def replicas(self, load_NE: Counts, held_RE: Counts, owner_E: Counts, costs: BalanceCosts) -> Counts:
        """See :meth:`.Policy.replicas`."""
        rows_E = load_NE[-1]
        homes_RE = np.zeros(held_RE.shape, dtype=bool)
        homes_RE[owner_E, np.arange(len(rows_E))] = True
        held = (held_RE > 0) | homes_RE
        slots = self.max_copies_per_rank
        held &= homes_RE | (np.cumsum(held & ~homes_RE, axis=1) <= slots)
        best = pass_time(even_split(rows_E, held), owner_E, costs).score
        for _ in range(_ROUNDS):
            tried = _adjusted(held, homes_RE, rows_E, slots)
            if tried is None:
                break
            time = pass_time(even_split(rows_E, tried), owner_E, costs).score
            if time >= best:
                break
            held, best = tried, time
        # Shares, not rows: an expert that had none is shared as well.
        return even_split(np.maximum(rows_E, 1) * held.sum(0), held)


def _adjusted(
    held: NDArray[np.bool_], homes: NDArray[np.bool_], rows_E: Counts, slots: int
) -> NDArray[np.bool_] | None:
    """One round; None where the hottest expert can get no replica."""
    replicas_E = held.sum(0)
    each_E = rows_E / replicas_E
    hot = int(np.argmax(each_E))
    load_R = even_split(rows_E, held).sum(1)
    new, used_R = held.copy(), (held & ~homes).sum(1)
    by_load = np.argsort(load_R, kind="stable")
    for rank in by_load:  # expand
        if used_R[rank] < slots and not held[rank, hot]:
            new[rank, hot] = True
            return new
    for cold in np.argsort(each_E, kind="stable"):  # shrink, then expand in its place
        given_up = [r for r in by_load if held[r, cold] and not homes[r, cold]]
        if cold == hot or not given_up:
            continue
        rank = given_up[0]
        new[rank, cold] = False
        if not held[rank, hot]:
            new[rank, hot] = True
            return new
        for other in by_load:  # migrate
            movable = np.flatnonzero(held[other] & ~homes[other] & ~new[rank])
            if other != rank and not held[other, hot] and len(movable):
                new[other, movable[0]], new[rank, movable[0]], new[other, hot] = False, True, True
                return new
        new[rank, cold] = True
    return None

# SPDX-License-Identifier: Apache-2.0
"""Experts packed on ranks with as many places each. Pure numpy."""

from __future__ import annotations

import numpy as np

from lightning_moefold.balance.assignment import Counts
from lightning_moefold.balance.placement import Placement


def greedy_parts(load_E: Counts, here_E: Counts, parts: int) -> Counts:
    """Rank of each expert: in falling load, each to the least loaded rank with a free slot, where it is if that ties."""
    room, load = [len(load_E) // parts] * parts, [0] * parts
    new_E = here_E.copy()
    for expert in np.argsort(-load_E, kind="stable"):
        least = min(load[p] for p in range(parts) if room[p])
        here = int(here_E[expert])
        part = (
            here
            if room[here] and load[here] == least
            else next(p for p in range(parts) if room[p] and load[p] == least)
        )
        new_E[expert] = part
        room[part] -= 1
        load[part] += int(load_E[expert])
    return new_E


def placed(part_E: Counts, current: Placement) -> Placement:
    """The placement with these ranks; experts that stay on theirs keep their slots."""
    order = np.argsort(part_E, kind="stable")
    return Placement(tuple(int(expert) for expert in order), current.parts).renumbered(current)

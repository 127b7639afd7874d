# SPDX-License-Identifier: Apache-2.0
"""What has to travel when a layer's placement changes. Pure Python.

Storage of a layer's experts is a stack with one row for each slot, cut over ep and, by ``fully_shard``, over edp: along the
rows (evenly or not), along another dimension, or not at all. A row that gets another expert takes it from the row where that
expert was; where rows are not cut over edp, every edp rank takes its own share of the row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from lightning_moefold.balance.placement import Placement, check_successor
from lightning_moefold.layout import chunk_split


class Row(NamedTuple):
    """A row of a stack on one rank.

    Args:
        ep: The rank's place on ep.
        edp: The rank's place on edp; None for every one, each with its share.
        row: Index in the rank's piece.
    """

    ep: int
    edp: int | None
    row: int


@dataclass(frozen=True)
class Move:
    """One row takes the content of another; both may be on one rank.

    Args:
        source: Where the expert was.
        target: Where it goes.
    """

    source: Row
    target: Row


def plan_moves(previous: Placement, placement: Placement, edp: int = 1, rows_are_cut: bool = False) -> list[Move]:
    """The moves that make one placement out of another, by target, the same on every rank.

    Args:
        previous: As the stacks are now.
        placement: As they shall be.
        edp: Ranks that share the experts of a part.
        rows_are_cut: Whether they share them by rows.

    Raises:
        InputError: If the placements are not of the same experts and parts.
    """
    check_successor(previous, placement)
    cuts = chunk_split(placement.slots_per_part, edp) if rows_are_cut else None
    return [
        Move(_row(previous.slot_of_expert[expert], placement, cuts), _row(slot, placement, cuts))
        for slot, expert in enumerate(placement.expert_of_slot)
        if previous.expert_of_slot[slot] != expert
    ]


def _row(slot: int, placement: Placement, cuts: tuple[int, ...] | None) -> Row:
    part, row = divmod(slot, placement.slots_per_part)
    if cuts is None:
        return Row(part, None, row)
    for edp, size in enumerate(cuts):
        if row < size:
            return Row(part, edp, row)
        row -= size
    raise AssertionError("the cuts hold all rows")

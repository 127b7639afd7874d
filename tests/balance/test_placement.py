# SPDX-License-Identifier: Apache-2.0
"""Placements and the moves between them, without any rank."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_moefold.balance.moves import Row, plan_moves
from lightning_moefold.balance.placement import Placement
from lightning_moefold.errors import InputError
from lightning_moefold.layout import chunk_split


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Placement, Placement]:
    parts, each = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    order = st.permutations(range(parts * each))
    return Placement(tuple(draw(order)), parts), Placement(tuple(draw(order)), parts)


def test_slots_and_parts() -> None:
    placement = Placement((4, 1, 0, 3, 5, 2), parts=3)
    assert placement.slot_of_expert == (2, 1, 5, 3, 0, 4)
    assert placement.part_of_expert == (1, 0, 2, 1, 0, 2)
    assert placement.experts_of_part(2) == (5, 2)
    assert placement.part_load([1, 2, 4, 8, 16, 32]).tolist() == [18, 9, 36]
    assert placement.part_load(np.ones((2, 3, 6))).shape == (2, 3, 3)
    assert not placement.is_contiguous
    assert Placement.contiguous(6, 3).is_contiguous
    assert Placement.contiguous(6, 3).part_of_expert == (0, 0, 1, 1, 2, 2)


@pytest.mark.parametrize(
    ("slots", "parts", "message"),
    [
        ((0, 0, 1, 2), 2, "must name each of 0 to 3 once"),
        ((1, 2, 3, 4), 2, "must name each of 0 to 3 once"),
        ((0, 1, 2), 2, "do not spread evenly over 2 parts"),
        ((0, 1), 0, "do not spread evenly over 0 parts"),
    ],
)
def test_what_is_no_placement(slots: tuple[int, ...], parts: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Placement(slots, parts)


def test_a_placement_follows_one_of_its_kind() -> None:
    with pytest.raises(InputError, match="4 experts on 4 parts cannot follow one of 4 experts on 2"):
        plan_moves(Placement.contiguous(4, 2), Placement.contiguous(4, 4))


@given(pairs())
@settings(deadline=None)
def test_renumbering_moves_only_what_changes_its_part(case: tuple[Placement, Placement]) -> None:
    before, after = case
    numbered = after.renumbered(before)
    assert numbered.part_of_expert == after.part_of_expert
    assert len(plan_moves(before, numbered)) == numbered.moved(before) == after.moved(before)


@given(pairs(), st.integers(1, 6), st.booleans())
@settings(deadline=None)
def test_moves_make_the_new_stacks_out_of_the_old(case: tuple[Placement, Placement], edp: int, cut: bool) -> None:
    before, after = case

    def stacks(placement: Placement) -> dict[Row, int]:
        sizes = chunk_split(placement.slots_per_part, edp) if cut else (placement.slots_per_part,)
        return {
            Row(part, i if cut else None, row): placement.experts_of_part(part)[sum(sizes[:i]) + row]
            for part in range(placement.parts)
            for i, size in enumerate(sizes)
            for row in range(size)
        }

    old, new = stacks(before), stacks(before)
    for move in plan_moves(before, after, edp, cut):
        new[move.target] = old[move.source]
    assert new == stacks(after)

# SPDX-License-Identifier: Apache-2.0
"""The boxes of owners tile each tensor exactly, for random shapes, cuts and folds."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_moefold import Fold
from lightning_moefold.layout import (
    Cut,
    Family,
    ParameterLayout,
    ParameterPlan,
    TensorGradient,
    chunk_split,
    even_split,
    split_boxes,
)
from tests.test_fold import folds


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Fold, ParameterLayout]:
    fold = draw(folds(16).filter(lambda f: f.pp == 1))
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    family = draw(st.sampled_from(Family))
    split = draw(st.sampled_from([even_split, chunk_split]))
    cuts = []
    for axis in ("tp",) if family is Family.DENSE else ("ep", "etp"):
        free = [d for d in range(len(shape)) if d not in {c.dim for c in cuts}]
        if free and draw(st.booleans()):
            dim = draw(st.sampled_from(free))
            cuts.append(Cut(axis, dim, split(shape[dim], fold.size(axis))))
    data_dim = draw(st.sampled_from([None, *range(len(shape))]))
    order = draw(st.one_of(st.none(), st.permutations(range(shape[0])).map(tuple)))
    return fold, ParameterLayout(shape, ParameterPlan(family, tuple(cuts)), data_dim, order=order)


@given(layouts())
@settings(max_examples=300, deadline=None)
def test_owners_tile_the_tensor(case: tuple[Fold, ParameterLayout]) -> None:
    """Each element comes once; and what a rank stores is its part of the tensor in the order of storage."""
    fold, layout = case
    times = torch.zeros(layout.shape, dtype=torch.int64)
    whole = torch.arange(times.numel()).view(layout.shape)
    stored = whole if layout.order is None else whole[list(layout.order)]
    for rank, boxes in layout.owners(fold, list(range(fold.world_size))):
        piece = stored[layout.stored_box(fold, rank).slices()]
        assert layout.boxes(fold, rank) == boxes
        for box, part in zip(boxes, split_boxes(piece, boxes), strict=True):
            times[box.slices()] += 1
            assert torch.equal(part, whole[box.slices()])
    assert bool((times == 1).all())


@given(layouts())
@settings(max_examples=100, deadline=None)
def test_copies_are_copies(case: tuple[Fold, ParameterLayout]) -> None:
    """Whoever is no owner holds the box of some owner, or an empty one."""
    fold, layout = case
    ranks = list(range(fold.world_size))
    owned = {boxes for _, boxes in layout.owners(fold, ranks)}
    assert all(layout.boxes(fold, r) in owned or layout.stored_box(fold, r).numel == 0 for r in ranks)


@given(st.integers(0, 200), st.integers(1, 17))
def test_splits(length: int, parts: int) -> None:
    assert sum(even_split(length, parts)) == sum(chunk_split(length, parts)) == length
    assert max(even_split(length, parts)) - min(even_split(length, parts)) <= 1
    chunks = [len(chunk) for chunk in torch.arange(length).chunk(parts)] if length else [0]
    assert chunk_split(length, parts)[: len(chunks)] == tuple(chunks)
    assert not any(chunk_split(length, parts)[len(chunks) :])


def test_flat_stacks_are_cut_where_experts_end() -> None:
    """Channels of 3 and 0, and of 2 and 5, over two ep ranks; the second dimension over edp."""
    fold = Fold.parse("| ep2", 4)
    plan = ParameterPlan(Family.EXPERT, (Cut("ep", 0, (3, 7)),), TensorGradient.SHARDED, flat=True)
    layout = ParameterLayout((10, 8), plan, data_dim=1)
    assert not layout.is_expert_stack
    empty = ParameterLayout((7, 8), replace(plan, cuts=(Cut("ep", 0, (0, 7)),)), data_dim=1)
    assert [empty.stored_box(fold, rank).sizes for rank in (0, 1)] == [(0, 8), (7, 4)]
    owned = [boxes for _, boxes in layout.owners(fold, [0, 1, 2, 3])]
    assert sorted((box.offsets, box.sizes) for boxes in owned for box in boxes) == [
        ((0, 0), (3, 4)), ((0, 4), (3, 4)), ((3, 0), (7, 4)), ((3, 4), (7, 4)),
    ]  # fmt: skip

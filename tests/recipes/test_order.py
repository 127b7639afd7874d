# SPDX-License-Identifier: Apache-2.0
"""Every row once an epoch, whatever the number of data ranks, and whatever it was before a resume."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_moefold.recipes import InputError
from lightning_moefold.recipes.order import EMPTY, Position, RowOrder


def make(count: int, batch: int, ranks: int, at: Position | None = None) -> list[RowOrder]:
    orders = [RowOrder(count, batch, rank, ranks, shuffle=True, seed=5) for rank in range(ranks)]
    for order in orders:
        if at is not None:
            order.go_on(at)
    return orders


def read(orders: list[RowOrder], batches: int | None = None) -> list[list[int]]:
    """Global batches, each as the rows of all ranks in the order in which they were dealt."""
    length = len(orders[0]) - orders[0]._begin.batches if batches is None else batches
    iterators = [iter(order) for order in orders]
    dealt = [torch.stack([next(iterator) for iterator in iterators]) for _ in range(length)]
    if batches is None:
        for iterator in iterators:
            assert next(iterator, None) is None
    return [rows.T.flatten().tolist() for rows in dealt]


def real(batches: list[list[int]]) -> list[int]:
    return [row for batch in batches for row in batch if row != EMPTY]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_an_epoch_reads_every_row_once(ranks):
    batches = read(make(21, 8, ranks))
    assert batches == read(make(21, 8, 1))
    assert [len(batch) for batch in batches] == [8, 8, 8]
    assert batches[-1][5:] == [EMPTY] * 3
    assert sorted(real(batches)) == list(range(21))


def test_epochs_differ_and_seeds_differ():
    [order] = make(50, 10, 1)
    first = read([order])
    order.set_epoch(1)
    second = read([order])
    other = RowOrder(50, 10, 0, 1, shuffle=True, seed=6)
    assert len({str(first), str(second), str(read([other]))}) == 3
    order.set_epoch(0)
    assert read([order]) == first


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(1, 60),
    stages=st.lists(
        st.tuples(st.sampled_from([1, 2, 3, 4]), st.integers(1, 4), st.integers(0, 5)), min_size=1, max_size=4
    ),
)
def test_resumes_under_other_ranks_and_batches_read_what_is_left(count, stages):
    """Each stage of a run reads a few batches and is interrupted; the last one reads to the end."""
    position, seen = Position(2), []
    done = 0
    for ranks, rows, batches in [*stages, (2, 3, None)]:
        orders = make(count, ranks * rows, ranks, position)
        left = len(orders[0]) - position.batches if position.rows < count else 0
        taken = left if batches is None else min(batches, left)
        seen += real(read(orders, taken))
        done += taken
        assert len({order.position for order in orders}) == 1
        position = orders[0].position
        if taken:
            assert position.batches == done
        assert position.rows == len(seen)
    assert sorted(seen) == list(range(count))
    assert seen == make(count, 1, 1)[0].permutation(2).tolist()


def test_dp_1_2_1_with_one_batch_size_is_the_uninterrupted_run():
    whole = read(make(30, 4, 1))
    parts, position = [], Position()
    for ranks, batches in ((1, 3), (2, 2), (1, None)):
        orders = make(30, 4, ranks, position)
        parts += read(orders, batches)
        position = orders[0].position
    assert parts == whole


def test_after_the_resumed_epoch_come_whole_ones():
    [order] = make(20, 4, 1, Position(epoch=3, rows=8, batches=2))
    assert len(order) == 5
    assert len(read([order])) == 3
    order.set_epoch(4)
    assert len(order) == 5
    assert sorted(real(read([order]))) == list(range(20))
    [order] = make(20, 8, 1, Position(epoch=3, rows=8, batches=2))  # with twice the batch: 2 done, 2 to come
    assert len(order) == 4
    order.set_epoch(4)
    assert len(order) == 3


def test_position_at_the_end_of_an_epoch_begins_the_next():
    [order] = make(20, 4, 1, Position(epoch=0, rows=20, batches=5))
    assert len(order) == 5
    order.set_epoch(1)
    assert len(read([order])) == 5


def test_a_batch_that_does_not_divide():
    with pytest.raises(InputError, match="multiple of 4"):
        RowOrder(20, 6, 0, 4, shuffle=True, seed=0)

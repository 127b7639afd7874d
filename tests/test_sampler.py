# SPDX-License-Identifier: Apache-2.0
"""A sampler reads every row once, in an order that no number of data ranks changes."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from lightning_moefold import ResumableSampler
from lightning_moefold.errors import InputError
from lightning_moefold.recipes.order import RowOrder
from lightning_moefold.sampler import order_of_rows


def sequence(count: int, epochs: int, seed: int = 3) -> list[int]:
    """The rows of all epochs."""
    return torch.cat([order_of_rows(count, seed, epoch) for epoch in range(epochs)]).tolist()


def loaders(count: int, ranks: int, rows: int, place: dict[str, int] | None = None, workers: int = 0) -> list[Any]:
    """The loader of each rank, as the strategy prepares it."""
    found = []
    for rank in range(ranks):
        sampler = ResumableSampler(range(count), seed=3)
        found.append(DataLoader(range(count), batch_size=rows, sampler=sampler, num_workers=workers))  # type: ignore[arg-type]
        sampler.deal(rank, ranks, rows)
        if place is not None:
            sampler.go_on(place)
    return found


def read(found: list[Any], batches: int) -> list[list[int]]:
    """Batches of this epoch, each as its rows over all ranks in the order in which they were dealt."""
    iterators = [iter(loader) for loader in found]
    return [torch.stack([next(i) for i in iterators]).T.flatten().tolist() for _ in range(batches)]


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(12, 40),
    stages=st.lists(
        st.tuples(st.sampled_from([1, 2, 4]), st.integers(1, 3), st.integers(0, 9)), min_size=1, max_size=5
    ),
)
def test_resumed_runs_read_the_rows_of_the_uninterrupted_one(count: int, stages: list[tuple[int, int, int]]) -> None:
    """Each stage reads some batches, over epochs, and is interrupted; its checkpoint begins the next."""
    place, seen = None, []
    for ranks, rows, batches in stages:
        found = loaders(count, ranks, rows, place)
        sampler = found[0].sampler
        done = sampler._now.batches
        while batches:
            taken = min(batches, len(found[0]) - done)
            read_now = read(found, taken)
            assert all(read_now[i] == sampler.rows_of_batch(done + i) for i in range(taken))
            seen += [row for batch in read_now for row in batch]
            batches, done = batches - taken, done + taken
            places = [asdict(loader.sampler._place_after(done)) for loader in found]
            assert places == [places[0]] * ranks
            place = places[0]
            if batches:
                for iterator in map(iter, found):
                    assert len(list(iterator)) == len(found[0]) - sampler._now.batches
                for loader in found:
                    loader.sampler.set_epoch(sampler._now.epoch + 1) if loader is not found[0] else None
                sampler.set_epoch(sampler._now.epoch + 1)
                done = 0
    assert seen == sequence(count, 1 + len(seen) // count)[: len(seen)]


def test_epochs_of_whole_batches() -> None:
    [loader] = loaders(21, 1, 8)
    epochs = []
    for epoch in range(4):
        loader.sampler.set_epoch(epoch)
        assert len(loader) == 2
        epochs += [row for batch in read([loader], 2) for row in batch]
    assert epochs == sequence(21, 4)[:64]
    assert sorted(epochs[:21]) == list(range(21))
    loader.sampler.set_epoch(0)
    assert read([loader], 1)[0] == epochs[:8]


def test_workers_read_ahead_and_the_place_is_that_of_training() -> None:
    found = loaders(40, 2, 2, workers=2)
    first = read(found, 3)
    place = asdict(found[0].sampler._place_after(3))
    rest = read(loaders(40, 1, 4, place), 7)
    assert first + rest == read(loaders(40, 1, 4), 10)


def test_the_order_is_that_of_text_data() -> None:
    order = RowOrder(24, 8, 1, 2, shuffle=True, seed=3)
    loader = loaders(24, 2, 4)[1]
    for epoch in range(2):
        order.set_epoch(epoch)
        loader.sampler.set_epoch(epoch)
        assert [batch.tolist() for batch in loader] == [batch.tolist() for batch in order]


def test_an_epoch_that_was_cut_short() -> None:
    """The next one goes on with the first row that was not trained on, whatever was read ahead."""
    trained = [7]
    sampler = ResumableSampler(range(40), shuffle=False)
    sampler.deal(0, 1, 4, lambda: trained[0])
    assert list(sampler) == list(range(40))
    trained[0] += 3
    assert sampler.place() == {"epoch": 0, "batches": 3, "row": 12, "end": 40}
    sampler.set_epoch(1)
    assert list(sampler)[:4] == [12, 13, 14, 15]
    assert len(sampler) == 40


def test_rows_in_order() -> None:
    sampler = ResumableSampler(range(10), shuffle=False)
    sampler.deal(1, 2, 2)
    assert list(sampler) == [1, 3, 5, 7]
    sampler.set_epoch(1)
    assert list(sampler) == [9, 1, 3, 5]


def test_bad_input() -> None:
    with pytest.raises(InputError, match="generator has no length"):
        ResumableSampler(n for n in range(3))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="only 7 rows"):
        ResumableSampler(range(7)).deal(0, 2, 4)

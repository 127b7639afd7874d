# SPDX-License-Identifier: Apache-2.0
"""Deals the rows of a map-style dataset to data ranks, so that a run goes on with the first row not yet read.

The rows of all epochs form one sequence: the order of the first epoch, that of the second, and so on. A batch is the next
rows of this sequence, of which rank r of D gets rows r, r + D, r + 2D, ... So it depends on the seed and the number of rows
read so far, and not on D.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DistributedSampler
from typing_extensions import override

from lightning_moefold.errors import InputError


def generator_of_epoch(seed: int, epoch: int) -> torch.Generator:
    """Returns the random numbers with which an epoch is shuffled."""
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)


def order_of_rows(count: int, seed: int, epoch: int) -> Tensor:
    """Returns the shuffled row numbers of an epoch, ``[count]``."""
    return torch.randperm(count, generator=generator_of_epoch(seed, epoch))


@dataclass(frozen=True)
class _Place:
    """How far training has come, over all data ranks.

    Args:
        epoch: Number of the epoch.
        batches: Batches of this epoch that were read.
        row: Rows read since the first epoch.
        end: The row before which this epoch ends; rows that make no whole batch are the first of the next epoch.
    """

    epoch: int
    batches: int
    row: int
    end: int


class ResumableSampler(DistributedSampler[Any]):
    """Deals rows to data ranks in an order that depends on the seed and the number of rows read so far alone.

    Give it to a ``DataLoader`` as ``sampler``. Under :class:`MoEFoldStrategy` checkpoints then hold its place: a run that is
    resumed, in the middle of an epoch as well, repeats no row and skips none, whatever its number of data ranks, rows per rank
    and worker processes. For the same batches under every fold, let each rank have its part of the global batch:

        rows = 16 // self.trainer.strategy.dp_size
        DataLoader(dataset, batch_size=rows, sampler=ResumableSampler(dataset))

    An epoch has whole batches only. Rows that are left at its end are the first of the next epoch.

    Args:
        dataset: The dataset; only its length is used.
        shuffle: Whether the order is drawn anew each epoch.
        seed: Seed of the order. With the same seed, ``TextData`` reads rows in the same order.

    Raises:
        InputError: If the dataset has no length.
    """

    #: So ranks need not tell each other before every batch that they have it.
    has_exact_length = True

    def __init__(self, dataset: Sized, *, shuffle: bool = True, seed: int = 0) -> None:
        if not hasattr(dataset, "__len__"):
            raise InputError(
                f"ResumableSampler draws rows by number, and {type(dataset).__name__} has no length; iterate over it in a loader "
                "with state_dict and load_state_dict instead."
            )
        super().__init__(dataset, num_replicas=1, rank=0, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self._count, self._rows = len(dataset), 1
        self._dealt: tuple[int, int] | None = None
        self._begin: _Place | None = None
        self._drawn: tuple[int, list[int]] | None = None
        self._done: Callable[[], int] | None = None
        self._done_before = 0
        self._asked: int | None = None

    def deal(self, rank: int, ranks: int, rows: int, done: Callable[[], int] | None = None) -> None:
        """Sets for whom this sampler draws, from the first row on. ``MoEFoldStrategy`` calls this.

        Args:
            rank: This data rank.
            ranks: Number of data ranks; without this call, those of the process group.
            rows: Rows of a batch on this rank.
            done: Counts the batches that were trained on, from any number. Where it says less than an epoch when the next begins,
                this one goes on where that one stopped; without it every epoch is thought to be read to its end.

        Raises:
            InputError: If the dataset has fewer rows than a batch on all ranks.
        """
        self.rank, self.num_replicas, self._rows = rank, ranks, rows
        self._dealt, self._begin, self._done = (rank, ranks), None, done
        self._asked = None
        self.count_from_here()
        if self.batches_per_epoch < 1:
            raise InputError(
                f"a batch has {rows} rows on each of {ranks} data ranks, and the dataset of ResumableSampler only {self._count} "
                "rows; use a smaller batch_size."
            )

    def place(self) -> dict[str, int]:
        """Returns how far training has come, the same on all ranks; without ``done``, where this epoch begins."""
        now = self._now
        return asdict(self._place_after(now.batches + (0 if self._done is None else self._done() - self._done_before)))

    def go_on(self, place: Mapping[str, int]) -> None:
        """Begins at a place, under any number of data ranks and rows of a batch."""
        begin = _Place(**place)
        self._begin = begin if self._batches_left(begin) > 0 else self._next_epoch(begin, begin.epoch + 1)
        self.count_from_here()

    def begin_after(self, place: Mapping[str, int]) -> None:
        """Begins a whole epoch at a place, with the rows that were left of the epoch before it."""
        row = place["row"]
        self._begin = _Place(place["epoch"] + 1, 0, row, row + self.batches_per_epoch * self._batch)
        self.count_from_here()

    @override
    def set_epoch(self, epoch: int) -> None:
        """Begins an epoch, unless the sampler was told to go on in the middle of it. Lightning calls this."""
        now, asked, self._asked = self._now, self._asked, epoch
        if self._done is not None:  # rows that were trained on say more than Lightning's number, which may be one ahead
            here = self.place()
            if here["row"] > now.row and epoch != asked:
                self.begin_after(here)
            elif here["row"] > now.row:
                self._begin = _Place(**here)
                self.count_from_here()
        elif epoch > now.epoch:
            self._begin = self._next_epoch(now, epoch)
        elif epoch < now.epoch:
            self._begin = self._next_epoch(_Place(-1, 0, 0, 0), epoch)

    @property
    def order(self) -> tuple[int, bool, int]:
        """Number of rows, whether they are shuffled, and the seed: a place says nothing about another order."""
        return self._count, self.shuffle, self.seed

    def rows_of_batch(self, number: int) -> list[int]:
        """Returns the row numbers of a batch of this epoch, over all data ranks."""
        first = self._place_after(number).row
        return [self._row(at) for at in range(first, first + self._batch)]

    @override
    def __len__(self) -> int:
        """Rows of this rank in this epoch, those that were read before included."""
        now = self._now
        return (now.batches + self._batches_left(now)) * self._rows

    @override
    def __iter__(self) -> Iterator[int]:
        rank, ranks = self._rank_and_ranks
        now = self._now
        for at in range(now.row + rank, now.row + self._batches_left(now) * self._batch, ranks):
            yield self._row(at)

    def count_from_here(self) -> None:
        """Takes what ``done`` says now for the beginning of this epoch, or of what is left of it."""
        self._done_before = 0 if self._done is None else self._done()

    @property
    def _rank_and_ranks(self) -> tuple[int, int]:
        """This rank and the number of ranks."""
        if self._dealt is not None:
            return self._dealt
        return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    @property
    def _batch(self) -> int:
        """Rows of a batch over all ranks."""
        return self._rows * self._rank_and_ranks[1]

    @property
    def batches_per_epoch(self) -> int:
        """Batches of an epoch that is read from its beginning."""
        return self._count // self._batch

    @property
    def _now(self) -> _Place:
        if self._begin is None:
            self._begin = self._next_epoch(_Place(-1, 0, 0, 0), 0)
        return self._begin

    def _place_after(self, batches: int) -> _Place:
        now = self._now
        return _Place(now.epoch, batches, now.row + (batches - now.batches) * self._batch, now.end)

    def _batches_left(self, place: _Place) -> int:
        return (place.end - place.row) // self._batch

    def _next_epoch(self, place: _Place, epoch: int) -> _Place:
        """Returns the beginning of a later epoch than that of ``place``."""
        rows = self.batches_per_epoch * self._batch
        row = place.row + self._batches_left(place) * self._batch + (epoch - place.epoch - 1) * rows
        return _Place(epoch, 0, row, row + rows)

    def _row(self, at: int) -> int:
        """Returns the row number at a place of the sequence."""
        epoch, place = divmod(at, self._count)
        if not self.shuffle:
            return place
        if self._drawn is None or self._drawn[0] != epoch:
            self._drawn = epoch, order_of_rows(self._count, self.seed, epoch).tolist()
        return self._drawn[1][place]

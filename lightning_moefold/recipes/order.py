# SPDX-License-Identifier: Apache-2.0
"""Which rows each data rank reads: a function of the seed and the rows consumed so far, whatever the fold.

A *global batch* is the next G rows of the epoch's order, dealt to the data ranks one by one: rank r of D takes rows r,
r + D, r + 2D, ... of it. So the batch, and each of its micro-batches, consists of the same rows under every fold, and a
run that is resumed under another D, or with another G, goes on with the first row that was not yet read. An epoch reads
each row once: where rows run out, ranks are given empty ones (:data:`EMPTY`), for every rank must have as many batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_moefold.errors import CheckpointError, InputError
from lightning_moefold.recipes.mixture import Mixture
from lightning_moefold.sampler import generator_of_epoch, order_of_rows

#: Stands for a row without any token that counts.
EMPTY = -1


@dataclass(frozen=True)
class Position:
    """How far an epoch has come, over all ranks.

    Args:
        epoch: Its number.
        rows: Rows read.
        batches: Global batches they were read in.
    """

    epoch: int = 0
    rows: int = 0
    batches: int = 0


def check_batch_size(batch_size: int, ranks: int) -> None:
    """Refuses a global batch that cannot be dealt evenly to the data ranks.

    Raises:
        InputError: If it cannot.
    """
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size} must be at least 1.")
    if batch_size % ranks:
        raise InputError(
            f"batch_size={batch_size} rows cannot be dealt evenly to {ranks} data ranks; use a multiple of {ranks}."
        )


def check_same_order(saved: Mapping[str, Any] | None, here: Mapping[str, Any]) -> None:
    """Refuses to go on in the middle of an epoch whose rows came in another order.

    Args:
        saved: What decided the order of the run that saved; None where it was not kept.
        here: What decides it now.

    Raises:
        CheckpointError: If they differ.
    """
    other = [name for name in here if saved is not None and saved.get(name) != here[name]]
    if saved is not None and other:
        there, now = (", ".join(f"{name}={of.get(name)}" for name in other) for of in (saved, here))
        raise CheckpointError(
            f"the checkpoint was saved in the middle of an epoch of data with {there}, and this run has {now}, so rows would be "
            "repeated or skipped; give what it had, or resume at the end of an epoch."
        )


class RowOrder:
    """The order of one data rank.

    Args:
        count: Rows there are.
        batch_size: Rows of a global batch, G.
        rank: This data rank.
        ranks: Number of data ranks, D.
        shuffle: Whether the order is drawn anew each epoch, or is that of the rows.
        seed: Of the shuffling.
        mixture: How often each row is read in an epoch; once if not given.

    Raises:
        InputError: If D does not divide G.
    """

    def __init__(
        self, count: int, batch_size: int, rank: int, ranks: int, *, shuffle: bool, seed: int,
        mixture: Mixture | None = None,
    ) -> None:  # fmt: skip
        check_batch_size(batch_size, ranks)
        self.count = count if mixture is None else mixture.count
        self.batch_size, self.rank, self.ranks = batch_size, rank, ranks
        self.shuffle, self.seed, self.mixture = shuffle, seed, mixture
        self.position, self._begin = Position(), Position()

    def set_epoch(self, epoch: int) -> None:
        """Begins an epoch, unless the order was told to go on in the middle of it. Lightning calls this."""
        if epoch != self._begin.epoch:
            self._begin = Position(epoch)

    @property
    def decided_by(self) -> dict[str, Any]:
        """What the order depends on: a position says nothing about another one."""
        weights = None if self.mixture is None else list(self.mixture.weights)
        return {"rows": self.count, "shuffle": self.shuffle, "seed": self.seed, "weights": weights}

    def go_on(self, position: Position) -> None:
        """Begins the epoch of ``position`` there; at its end, if no row is left of it."""
        self.position = self._begin = position

    def __len__(self) -> int:
        """Batches of this epoch, those that were read before (with another G, maybe) included."""
        begin = self._begin
        if begin.rows >= self.count:  # the epoch is over, and the next is a whole one
            begin = Position()
        return begin.batches + -(-(self.count - begin.rows) // self.batch_size)

    def permutation(self, epoch: int) -> Tensor:
        """The order of all rows in an epoch."""
        if self.mixture is not None:
            return self.mixture.draw(generator_of_epoch(self.seed, epoch) if self.shuffle else None)
        return order_of_rows(self.count, self.seed, epoch) if self.shuffle else torch.arange(self.count)

    def rows_of_batch(self, number: int) -> list[int]:
        """The rows of a global batch of this epoch, over all data ranks.

        Args:
            number: Of the batch in the epoch, counted from 0 and from the epoch's beginning, as Lightning does.
        """
        first = self._begin.rows + (number - self._begin.batches) * self.batch_size
        return self.permutation(self._begin.epoch)[max(first, 0) : first + self.batch_size].tolist()

    def __iter__(self) -> Iterator[Tensor]:
        """Row numbers of this rank's batches, each ``[G / D]``."""
        begin = self._begin
        order = self.permutation(begin.epoch)
        for number, start in enumerate(range(begin.rows, self.count, self.batch_size), start=1):
            taken = order[start : start + self.batch_size]
            self.position = Position(begin.epoch, start + len(taken), begin.batches + number)
            padded = torch.full((self.batch_size,), EMPTY)
            padded[: len(taken)] = taken
            yield padded[self.rank :: self.ranks]


class RowLoader:
    """Batches of one data rank, from rows in memory. What Lightning asks of a dataloader, without worker processes.

    Args:
        order: Gives row numbers.
        collate: Makes a batch of them.
        decided_by: What the rows depend on, besides their order.
    """

    has_exact_length = True  # so ranks need not tell each other before every batch that they have it

    def __init__(
        self,
        order: RowOrder,
        collate: Callable[[Tensor], dict[str, Tensor]],
        decided_by: Mapping[str, Any] | None = None,
    ) -> None:
        self.sampler = self.batch_sampler = order  # the names under which Lightning looks for set_epoch
        self._collate, self._decided_by = collate, order.decided_by | dict(decided_by or {})

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return map(self._collate, self.sampler)

    def state_dict(self) -> dict[str, Any]:
        """The position, and what the order depends on; the same on all ranks."""
        return asdict(self.sampler.position) | {"order": self._decided_by}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a position, under any number of ranks and batch size.

        Raises:
            CheckpointError: If it is in the middle of an epoch of another order.
        """
        order = state.get("order")
        position = Position(**{name: state[name] for name in ("epoch", "rows", "batches")})
        if order is not None and position.rows >= order["rows"]:  # the end, of however many rows there are now
            position = replace(position, rows=self.sampler.count)
        elif position.rows:
            check_same_order(order, self._decided_by)
        self.sampler.go_on(position)

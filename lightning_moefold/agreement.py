# SPDX-License-Identifier: Apache-2.0
"""Agreement of ranks on errors and batches, so that no rank raises alone while the others wait for it forever.

An error on one rank is raised on all. Ranks of one data replica must receive the same batch; otherwise stages of a
pipeline would wait for each other forever. The check needs no collective of its own: each rank computes a small number
from its data, and adds this number and its square to the two slots of its data rank in a sum over all ranks. The
numbers of a replica are equal exactly if the number of its ranks times the sum of squares equals the square of the sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_moefold import comm
from lightning_moefold.errors import BatchError, PeerError
from lightning_moefold.mesh import Axis, FoldedMesh

#: Numbers are below this prime, so that sums of their squares are exact in float64.
PRIME = 1048573


def fingerprint(tensor: Tensor) -> Tensor:
    """Hashes the bits of a tensor to a number below :data:`PRIME`, a scalar int64 on its device."""
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    words = raw.view(torch.int32) if raw.numel() % 4 == 0 and raw.storage_offset() % 4 == 0 else raw
    place = torch.arange(words.numel(), device=words.device) % 8191 + 1
    return (words.long() % PRIME * place % PRIME).sum() % PRIME


def same_batch_slots(number: Tensor, mesh: FoldedMesh) -> Tensor:
    """Returns this rank's term of the sum, ``[dp, 2]`` float64, for the fingerprint of all data that it received."""
    slots = torch.zeros(mesh.fold.dp, 2, dtype=torch.float64, device=number.device)
    slots[mesh.place["dp"]] = torch.stack([number, number * number]).double()
    return slots


def check_readable(unreadable: bool, error: Exception | None, axis: Axis | None) -> None:
    """Raises on all ranks of an axis if one of them cannot begin a call: its batch cannot be read, or its model not trained.

    Args:
        unreadable: Whether any rank of the axis cannot, the same on all of them.
        error: This rank's error, or None.
        axis: The ranks that know; None in a single process.

    Raises:
        Exception: This rank's own error; on ranks without one, a BatchError that quotes it.
    """
    if unreadable and axis is not None:
        try:
            agree_on_error(error, axis)
        except PeerError as peers:
            raise BatchError(str(peers)) from None
    if error is not None:
        raise error


def check_same_batch(totals: Tensor, ranks: int) -> None:
    """Raises if ranks of a replica were given different batches.

    Args:
        totals: The results of :func:`same_batch_slots`, summed over ranks.
        ranks: Number of ranks of one replica.

    Raises:
        BatchError: If they were; raised on every rank.
    """
    first, second = totals.view(-1, 2).unbind(1)
    if bool((second * ranks != first * first).any()):
        raise BatchError(
            "ranks of a tensor, context or pipeline parallel group were given different batches or arguments, but they "
            "compute one batch together; shard the data by strategy.dp_rank and strategy.dp_size, and shuffle with a seed "
            "that all share."
        )


def agree_on_error(error: Exception | None, axis: Axis) -> None:
    """Raises on every rank of ``axis`` if any of them has an error, so that no peer waits for one that is gone. Collective.

    Raises:
        Exception: This rank's own error; on ranks without one, a PeerError that quotes the first failing rank's.
    """
    found = comm.all_gather_objects(None if error is None else f"{type(error).__name__}: {error}", axis)
    if error is not None:
        raise error
    for rank, text in zip(axis.ranks, found, strict=True):
        if text is not None:
            raise PeerError(f"rank {rank} failed: {text}")


@contextmanager
def agreeing(axis: Axis, *kinds: type[Exception]) -> Iterator[None]:
    """A context whose error on one rank is raised on all. Collective: every rank of ``axis`` enters and leaves it.

    Args:
        axis: Usually the world.
        kinds: Kinds of errors that are agreed on, by default all; other errors are raised only on their rank.
    """
    error: Exception | None = None
    try:
        yield
    except kinds or (Exception,) as failure:
        error = failure
    agree_on_error(error, axis)

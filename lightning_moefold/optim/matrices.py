# SPDX-License-Identifier: Apache-2.0
"""Whole matrices from the pieces that ranks hold of them, and the pieces of whole matrices.

A parameter is cut over at most one axis of its data ranks and one of its tensor ranks. The axis of experts stays cut: each of
their matrices is gathered only over what cuts the matrix itself.

Legend: E experts here, A rows, B columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_moefold.comm import ALL_GATHER

#: Numbers of one collective.
_BUCKET = 1 << 24


@dataclass(frozen=True)
class MatrixCut:
    """A cut of a parameter over the ranks of a group.

    Args:
        group: The group.
        ranks: Its size.
        index: This rank's place in it.
        dim: Dimension that is cut.
        total: Length of the dimension before this cut.
    """

    group: Any
    ranks: int
    index: int
    dim: int
    total: int

    @property
    def largest(self) -> int:
        """Length of the largest piece."""
        return -(-self.total // self.ranks)

    def piece(self, rank: int) -> slice:
        """Returns where a rank's piece is: pieces are as large as the largest until nothing is left, as fully_shard cuts."""
        start, stop = (min(number * self.largest, self.total) for number in (rank, rank + 1))
        return slice(start, stop)


def cuts_of(parameter: Tensor, experts: bool) -> tuple[MatrixCut, ...]:
    """Returns the cuts of a parameter's matrices, the innermost first.

    Args:
        parameter: The parameter.
        experts: Whether its first dimension is that of experts.
    """
    if not isinstance(parameter, DTensor):
        return ()
    mesh, placements = parameter.device_mesh, parameter.placements
    # What fully_shard cuts it cuts last, though its axis comes first: torch then calls the placement strided.
    order = sorted(
        (n for n, placement in enumerate(placements) if not placement.is_replicate()),
        key=lambda n: (type(placements[n]).__name__ != "_StridedShard", -n),
    )
    cuts: list[MatrixCut] = []
    sizes = list(parameter.shape)
    for number in reversed(order):  # from the outermost, which cuts the whole
        dim = placements[number].dim  # type: ignore[attr-defined]
        cut = MatrixCut(mesh.get_group(number), mesh.size(number), mesh.get_local_rank(number), dim, sizes[dim])
        piece = cut.piece(cut.index)
        sizes[dim] = piece.stop - piece.start
        if not (experts and dim == 0):
            cuts.insert(0, cut)
    return tuple(cuts)


def gather_matrices(pieces: Sequence[Tensor], cuts: Sequence[tuple[MatrixCut, ...]]) -> list[Tensor]:
    """Returns whole matrices. Collective over the groups of the cuts: every rank passes its pieces of the same ones in order."""
    whole = list(pieces)
    for depth in range(max((len(c) for c in cuts), default=0)):
        by_group: dict[int, list[int]] = {}
        for number, found in enumerate(cuts):
            if len(found) > depth:
                by_group.setdefault(id(found[depth].group), []).append(number)
        for numbers in by_group.values():
            for bucket in _buckets(numbers, whole):
                _gather(whole, bucket, [cuts[n][depth] for n in bucket])
    return whole


def own_piece(whole: Tensor, cuts: Sequence[MatrixCut]) -> Tensor:
    """Returns this rank's piece of a whole matrix; the inverse of :func:`gather_matrices`."""
    for cut in reversed(cuts):
        piece = cut.piece(cut.index)
        whole = whole.narrow(cut.dim, piece.start, piece.stop - piece.start)
    return whole


def _buckets(numbers: list[int], tensors: list[Tensor]) -> list[list[int]]:
    buckets: list[list[int]] = []
    size = _BUCKET
    for number in numbers:
        same = bool(buckets) and tensors[buckets[-1][0]].dtype == tensors[number].dtype
        if size + tensors[number].numel() > _BUCKET or not same:
            buckets.append([])
            size = 0
        buckets[-1].append(number)
        size += tensors[number].numel()
    return buckets


def _gather(whole: list[Tensor], numbers: list[int], cuts: list[MatrixCut]) -> None:
    """Puts the pieces of all ranks together, in place, in one collective."""
    padded = []
    for number, cut in zip(numbers, cuts, strict=True):
        piece, missing = whole[number], cut.largest - whole[number].shape[cut.dim]
        if missing:
            shape = list(piece.shape)
            shape[cut.dim] = missing
            piece = torch.cat([piece, piece.new_zeros(shape)], dim=cut.dim)
        padded.append(piece)
    flat = torch.cat([piece.flatten() for piece in padded])
    ranks = cuts[0].ranks
    everyone = flat.new_empty(ranks * flat.numel())
    getattr(dist, ALL_GATHER)(everyone, flat, group=cuts[0].group)
    rows = everyone.view(ranks, -1)
    ends = torch.tensor([0, *(piece.numel() for piece in padded)]).cumsum(0).tolist()
    for (start, end), number, cut, piece in zip(pairwise(ends), numbers, cuts, padded, strict=True):
        parts = [
            rows[rank, start:end].view(piece.shape).narrow(cut.dim, 0, cut.piece(rank).stop - cut.piece(rank).start)
            for rank in range(ranks)
        ]
        whole[number] = torch.cat(parts, dim=cut.dim)

# SPDX-License-Identifier: Apache-2.0
"""Functions of whole matrices of which ranks hold pieces: the ranks divide the matrices among them.

A parameter is cut over at most one axis of its data ranks and one of its tensor ranks. The axis of experts stays cut: each of
their matrices is made whole only over what cuts the matrix itself.

Legend: E experts here, A rows, B columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

#: Numbers of whole matrices that a rank holds at a time, if the ranks divide them evenly; the busiest may hold one part more.
MOST_NUMBERS = 1 << 28


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


def most_experts(parameter: Tensor) -> int:
    """Returns the largest number of experts that a rank holds of a stack, which all ranks know."""
    cut_over = 1
    if isinstance(parameter, DTensor):
        for number, placement in enumerate(parameter.placements):
            if not placement.is_replicate() and placement.dim == 0:  # type: ignore[attr-defined]
                cut_over *= parameter.device_mesh.size(number)
    return -(-parameter.shape[0] // cut_over)


@dataclass(frozen=True)
class Part:
    """A matrix, or the matrices of some experts of a stack, of which this rank holds pieces.

    Args:
        parameter: The parameter.
        place: Where they are in this rank's piece of the parameter.
        cuts: Cuts of the matrices, the innermost first.
        whole: Numbers of the whole matrices on the rank that has most of them; all ranks know it.
    """

    parameter: Tensor
    place: Any
    cuts: tuple[MatrixCut, ...]
    whole: int

    @property
    def numbers(self) -> int:
        """Numbers that a rank makes whole, if those that divide the work make equally many."""
        return -(-self.whole // prod(cut.ranks for cut in self.cuts))


def in_chunks(matrices: Iterable[tuple[Tensor, bool]]) -> Iterator[list[Part]]:
    """Yields parts of matrices of about :data:`MOST_NUMBERS` a rank, or a single part, the same on all ranks.

    Args:
        matrices: Parameters, and whether their first dimension is that of experts.
    """
    chunk: list[Part] = []
    for parameter, experts in matrices:
        for part in _parts_of(parameter, experts):
            if chunk and sum(other.numbers for other in chunk) + part.numbers > MOST_NUMBERS:
                yield chunk
                chunk = []
            chunk.append(part)
    if chunk:
        yield chunk


def _parts_of(parameter: Tensor, experts: bool) -> Iterator[Part]:
    """Cuts a stack into about as many parts as there are ranks that divide the work, or into more so that none is too large."""
    cuts = cuts_of(parameter, experts)
    ranks, matrix = prod(cut.ranks for cut in cuts), prod(parameter.shape[-2:])
    if not experts:
        yield Part(parameter, ..., cuts, matrix)
        return
    held = most_experts(parameter)
    size = max(1, min(-(-held // ranks), MOST_NUMBERS // max(1, matrix)))
    for first in range(0, held, size):
        yield Part(parameter, slice(first, first + size), cuts, matrix * size)


def apply_to_whole(
    matrices: list[Tensor],
    cuts: Sequence[tuple[MatrixCut, ...]],
    sizes: Sequence[int],
    function: Callable[[Tensor], Tensor],
) -> None:
    """Puts this rank's pieces of ``function(whole matrix)`` in the place of its pieces of the matrices.

    The ranks that hold pieces of the same matrices divide these among them: one rank makes a matrix whole, applies the function,
    and sends the pieces back. Collective over the groups of the cuts.

    Args:
        matrices: Pieces, of the same matrices on all ranks in the same order.
        cuts: Cuts of each, the innermost first.
        sizes: By which the matrices are divided, the same on all ranks; pieces, and what is put together of some, may differ.
        function: Whose result has the shape and the dtype of its argument.
    """
    by_group: dict[Any, list[int]] = {}
    for number, found in enumerate(cuts):
        by_group.setdefault((id(found[0].group), matrices[number].dtype) if found else None, []).append(number)
    for key, numbers in by_group.items():
        if key is None:
            for number in numbers:
                matrices[number] = function(matrices[number])
        else:
            pieces = [matrices[n] for n in numbers]
            done = _divided(pieces, [cuts[n] for n in numbers], [sizes[n] for n in numbers], function)
            for number, matrix in zip(numbers, done, strict=True):
                matrices[number] = matrix


def _divided(
    pieces: list[Tensor],
    cuts: list[tuple[MatrixCut, ...]],
    sizes: list[int],
    function: Callable[[Tensor], Tensor],
) -> list[Tensor]:
    """As :func:`apply_to_whole`, of matrices of one dtype whose innermost cut is over one group."""
    first = [found[0] for found in cuts]
    group, index = first[0].group, first[0].index
    owned = _owned(sizes, first[0].ranks)
    mine = owned[index]

    def shape(number: int, rank: int) -> list[int]:
        sizes, there = list(pieces[number].shape), first[number].piece(rank)
        sizes[first[number].dim] = there.stop - there.start
        return sizes

    sent = [[pieces[n] for n in numbers] for numbers in owned]
    arrived = _exchange(sent, [[shape(n, rank) for n in mine] for rank in range(len(owned))], pieces[0], group)
    whole = [torch.cat(parts, first[n].dim) for n, *parts in zip(mine, *arrived, strict=True)]
    del sent, arrived
    apply_to_whole(whole, [cuts[n][1:] for n in mine], [sizes[n] for n in mine], function)
    back = [
        [_piece_of(matrix, first[n], rank) for n, matrix in zip(mine, whole, strict=True)] for rank in range(len(owned))
    ]
    returned = _exchange(back, [[shape(n, index) for n in numbers] for numbers in owned], pieces[0], group)
    found = {
        n: piece
        for numbers, parts in zip(owned, returned, strict=True)
        for n, piece in zip(numbers, parts, strict=True)
    }
    return [found[n] for n in range(len(pieces))]


def _piece_of(whole: Tensor, cut: MatrixCut, rank: int) -> Tensor:
    piece = cut.piece(rank)
    return whole.narrow(cut.dim, piece.start, piece.stop - piece.start)


def _owned(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Which matrices each rank makes whole: the largest first, each by the rank with the fewest numbers so far."""
    owned: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * len(owned)
    for number in sorted(range(len(sizes)), key=lambda n: -sizes[n]):
        rank = loads.index(min(loads))
        owned[rank].append(number)
        loads[rank] += sizes[number]
    return owned


def _exchange(
    send: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[Sequence[int]]], like: Tensor, group: Any
) -> list[list[Tensor]]:
    """Sends tensors to each rank of a group and returns those of each rank, whose shapes are known, in one collective."""
    flat = torch.cat([like.new_empty(0), *(tensor.flatten() for tensors in send for tensor in tensors)])
    sizes = [[prod(shape) for shape in of_rank] for of_rank in shapes]
    receive = [sum(of_rank) for of_rank in sizes]
    out = like.new_empty(sum(receive))
    dist.all_to_all_single(out, flat, receive, [sum(t.numel() for t in tensors) for tensors in send], group=group)
    return [
        [tensor.view(*shape) for tensor, shape in zip(part.split(of_rank), shapes_of_rank, strict=True)]
        if of_rank
        else []
        for part, of_rank, shapes_of_rank in zip(out.split(receive), sizes, shapes, strict=True)
    ]

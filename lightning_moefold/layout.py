# SPDX-License-Identifier: Apache-2.0
"""Where each piece of each parameter lives. Pure Python.

A parameter belongs to one :class:`Family` and is cut along some dimensions over tp (dense) or ep and etp (experts),
then by ``fully_shard`` over the ranks that hold the same piece (dense: dp x cp; experts: edp). What a rank then stores
is one *box* of the global tensor or, where experts have moved, several, one after the other. Reading checkpoints, writing
them, norms and initialisation all ask the same :class:`ParameterLayout`, so there is one answer to "which rank holds which
elements".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from lightning_moefold.fold import Fold

if TYPE_CHECKING:
    from torch import Tensor


class Family(str, Enum):
    """Which ranks hold copies of a parameter. Its gradient is summed over these ranks."""

    #: Attention, norms, router, shared expert, embedding, head: data-parallel over dp x cp.
    DENSE = "dense"
    #: Routed experts: data-parallel over edp.
    EXPERT = "expert"


class TensorGradient(str, Enum):
    """How the gradients of a parameter on the ranks of its tensor parallel group are related."""

    #: The parameter is cut; each rank has the gradient of its own piece.
    SHARDED = "sharded"
    #: The parameter is replicated and each rank saw different tokens or heads: gradients are summed over tp.
    PARTIAL = "partial"
    #: The parameter is replicated and every rank computed the same: gradients are equal and never summed.
    IDENTICAL = "identical"


@dataclass(frozen=True)
class Cut:
    """One dimension of a tensor cut over one axis of the fold.

    Args:
        axis: ``"tp"``, ``"ep"`` or ``"etp"``.
        dim: Tensor dimension that is cut.
        sizes: Length of the piece at each coordinate of the axis. The lengths may differ; their sum is the global
            length.
    """

    axis: str
    dim: int
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class ParameterPlan:
    """How one parameter is cut and reduced. Modules declare it, and :mod:`..parallel` carries it out.

    Args:
        family: Which ranks hold copies.
        cuts: Along which dimensions it is cut.
        gradient: How gradients of a tensor parallel group are related.
        flat: Whether dimension 0 counts the channels of experts, one expert after the other, instead of experts.
    """

    family: Family = Family.DENSE
    cuts: tuple[Cut, ...] = ()
    gradient: TensorGradient = TensorGradient.PARTIAL
    flat: bool = False


@dataclass(frozen=True)
class Box:
    """A rectangular part of a tensor: ``offsets`` and ``sizes`` per dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """Returns the box of a whole tensor."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)

    def slices(self) -> tuple[slice, ...]:
        """Index expression of the box in the global tensor."""
        return tuple(slice(start, start + size) for start, size in zip(self.offsets, self.sizes, strict=True))


def even_split(length: int, parts: int) -> tuple[int, ...]:
    """Splits ``length`` as evenly as possible, with the longer pieces first."""
    base, more = divmod(length, parts)
    return tuple(base + (i < more) for i in range(parts))


def chunk_split(length: int, parts: int) -> tuple[int, ...]:
    """Splits ``length`` as ``torch.chunk`` (and so DTensor and FSDP2) does: equal pieces, the last ones shorter or empty."""
    step = -(-length // parts)
    return tuple(max(0, min(step, length - i * step)) for i in range(parts))


@dataclass(frozen=True)
class ParameterLayout:
    """Where one parameter is stored under a fold.

    Args:
        shape: Global shape, without padding.
        plan: The parameter's family, its cuts over tensor axes, and how its gradient is summed over tp.
        data_dim: Dimension that ``fully_shard`` cuts over the family's data axis; None if the parameter is replicated.
        pp_ranks: Pipeline ranks that hold the parameter (a tied embedding is on two); None if all do.
        order: Index in the global tensor of each index along dimension 0 as it is stored (the expert of each slot), where
            those differ; None if they are the same.
    """

    shape: tuple[int, ...]
    plan: ParameterPlan
    data_dim: int | None = None
    pp_ranks: tuple[int, ...] | None = None
    order: tuple[int, ...] | None = None

    @property
    def data_axis(self) -> str:
        """Name of the fold's axis over which the gradient is summed."""
        return "edp" if self.plan.family is Family.EXPERT else "dp_cp"

    @property
    def is_expert_stack(self) -> bool:
        """Whether dimension 0 counts experts, which are spread over ep."""
        return not self.plan.flat and any(cut.axis == "ep" and cut.dim == 0 for cut in self.plan.cuts)

    def tensor_box(self, place: Mapping[str, int]) -> Box:
        """Returns the part that the data ranks at coordinates ``place`` hold together, before ``fully_shard`` cuts it further.

        It is in the order of storage, as :meth:`stored_box` is.
        """
        offsets, sizes = [0] * len(self.shape), list(self.shape)
        for cut in self.plan.cuts:
            offsets[cut.dim] = sum(cut.sizes[: place[cut.axis]])
            sizes[cut.dim] = cut.sizes[place[cut.axis]]
        return Box(tuple(offsets), tuple(sizes))

    def boxes(self, fold: Fold, rank: int) -> tuple[Box, ...]:
        """Returns the parts of the global tensor that ``rank`` stores, one after the other along dimension 0; usually one.

        One empty box where it stores nothing.
        """
        stored = self.stored_box(fold, rank)
        if self.order is None or stored.numel == 0:
            return (stored,)
        first, rows = stored.offsets[0], stored.sizes[0]
        runs = _runs(self.order[first : first + rows])
        return tuple(Box((start, *stored.offsets[1:]), (length, *stored.sizes[1:])) for start, length in runs)

    def stored_box(self, fold: Fold, rank: int) -> Box:
        """Returns the part that ``rank`` stores, in the order of storage: its sizes are those of the piece.

        Empty where its pipeline stage does not hold the parameter. Where it lies in the global tensor, :meth:`boxes` says.
        """
        place = fold.coordinates(rank)
        if self.pp_ranks is not None and place["pp"] not in self.pp_ranks:
            return Box((0,) * len(self.shape), (0,) * len(self.shape))
        whole = self.tensor_box(place)
        if self.data_dim is None or (self.plan.flat and whole.numel == 0):
            return whole
        position = place["edp"] if self.data_axis == "edp" else place["dp"] * fold.cp + place["cp"]
        pieces = chunk_split(whole.sizes[self.data_dim], fold.size(self.data_axis))
        offsets, sizes = list(whole.offsets), list(whole.sizes)
        offsets[self.data_dim] += sum(pieces[:position])
        sizes[self.data_dim] = pieces[position]
        return Box(tuple(offsets), tuple(sizes))

    def is_owner(self, fold: Fold, rank: int) -> bool:
        """Whether ``rank`` owns its box: of the ranks that hold a copy, only the owner counts it in norms and writes it."""
        place = fold.coordinates(rank)
        cut_axes = {cut.axis for cut in self.plan.cuts}
        if self.plan.family is Family.EXPERT:
            copies = [axis for axis in ("ep", "etp") if axis not in cut_axes]
            copies += [] if self.data_dim is not None else ["edp"]
        else:
            copies = [axis for axis in ("tp",) if axis not in cut_axes]
            copies += [] if self.data_dim is not None else ["dp", "cp"]
        return place["pp"] == (self.pp_ranks or (0,))[0] and all(place[axis] == 0 for axis in copies)

    def owners(self, fold: Fold, ranks: list[int]) -> list[tuple[int, tuple[Box, ...]]]:
        """Returns the owners among ``ranks`` with their boxes, which together hold every element exactly once."""
        return [
            (rank, self.boxes(fold, rank))
            for rank in ranks
            if self.is_owner(fold, rank) and self.stored_box(fold, rank).numel > 0
        ]


def split_boxes(piece: Tensor, boxes: Sequence[Box]) -> tuple[Tensor, ...]:
    """Returns a rank's piece as views of its boxes, as :meth:`ParameterLayout.boxes` gives them."""
    return (piece,) if len(boxes) == 1 else piece.split([box.sizes[0] for box in boxes])


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Start and length of each run of consecutive numbers."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((number, 1))
    return runs

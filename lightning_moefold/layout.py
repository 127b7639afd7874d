# SPDX-License-Identifier: Apache-2.0
"""Where each piece of each parameter lives. Pure Python.

A parameter belongs to one :class:`Family` and is cut along some dimensions over tp (dense) or ep and etp (experts),
then by ``fully_shard`` over the ranks that hold the same piece (dense: dp x cp; experts: edp). What a rank then stores
is one *box* of the global tensor. Reading checkpoints, writing them, norms and initialisation all ask the same
:class:`ParameterLayout`, so there is one answer to "which rank holds which elements".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from lightning_moefold.fold import Fold


class Family(str, Enum):
    """Which ranks hold copies of a parameter, hence over which its gradient is summed."""

    #: Attention, norms, router, shared expert, embedding, head: data-parallel over dp x cp.
    DENSE = "dense"
    #: Routed experts: data-parallel over edp.
    EXPERT = "expert"


class TensorGradient(str, Enum):
    """What the gradient of a parameter is on the ranks of its tensor parallel group."""

    #: The parameter is cut; each rank's gradient is that of its own piece.
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
        dim: Tensor dimension.
        sizes: Length of the piece of each coordinate on the axis; their sum is the global length. May be uneven.
    """

    axis: str
    dim: int
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class ParameterPlan:
    """How a module wants one of its parameters to be treated; modules declare it, :mod:`..parallel` carries it out."""

    family: Family = Family.DENSE
    cuts: tuple[Cut, ...] = ()
    gradient: TensorGradient = TensorGradient.PARTIAL


@dataclass(frozen=True)
class Box:
    """A rectangular part of a tensor: ``offsets`` and ``sizes`` per dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        total = 1
        for size in self.sizes:
            total *= size
        return total

    def slices(self) -> tuple[slice, ...]:
        """Index expression of the box in the global tensor."""
        return tuple(slice(start, start + size) for start, size in zip(self.offsets, self.sizes, strict=True))


def even_split(length: int, parts: int) -> tuple[int, ...]:
    """``length`` split as evenly as possible, the longer pieces first."""
    base, more = divmod(length, parts)
    return tuple(base + (i < more) for i in range(parts))


def chunk_split(length: int, parts: int) -> tuple[int, ...]:
    """``length`` split as ``torch.chunk`` (and so DTensor and FSDP2) does: equal pieces, the last ones shorter or empty."""
    step = -(-length // parts)
    return tuple(max(0, min(step, length - i * step)) for i in range(parts))


@dataclass(frozen=True)
class ParameterLayout:
    """The whole truth about one parameter's storage under one fold.

    Args:
        shape: True global shape (no padding).
        plan: Family, cuts over tensor axes, and state of the gradient.
        data_dim: Dimension that ``fully_shard`` cuts over the family's data axis, or None where it is replicated.
        stages: Pipeline ranks that hold the parameter (a tied embedding is on two); None for all.
    """

    shape: tuple[int, ...]
    plan: ParameterPlan
    data_dim: int | None = None
    stages: tuple[int, ...] | None = None

    @property
    def data_axis(self) -> str:
        """The axis of the fold over which the gradient is summed."""
        return "edp" if self.plan.family is Family.EXPERT else "dp_cp"

    def tensor_box(self, place: Mapping[str, int]) -> Box:
        """The part held by the ranks at ``place`` together, before ``fully_shard`` cuts it further."""
        offsets, sizes = [0] * len(self.shape), list(self.shape)
        for cut in self.plan.cuts:
            offsets[cut.dim] = sum(cut.sizes[: place[cut.axis]])
            sizes[cut.dim] = cut.sizes[place[cut.axis]]
        return Box(tuple(offsets), tuple(sizes))

    def box(self, fold: Fold, rank: int) -> Box:
        """The part that ``rank`` stores; an empty one where its pipeline stage does not hold the parameter."""
        place = fold.coordinates(rank)
        if self.stages is not None and place["pp"] not in self.stages:
            return Box((0,) * len(self.shape), (0,) * len(self.shape))
        whole = self.tensor_box(place)
        if self.data_dim is None:
            return whole
        position = place["edp"] if self.data_axis == "edp" else place["dp"] * fold.cp + place["cp"]
        pieces = chunk_split(whole.sizes[self.data_dim], fold.size(self.data_axis))
        offsets, sizes = list(whole.offsets), list(whole.sizes)
        offsets[self.data_dim] += sum(pieces[:position])
        sizes[self.data_dim] = pieces[position]
        return Box(tuple(offsets), tuple(sizes))

    def is_owner(self, fold: Fold, rank: int) -> bool:
        """Whether ``rank`` is the one that counts and writes its box, among the ranks that hold copies of it."""
        place = fold.coordinates(rank)
        cut_axes = {cut.axis for cut in self.plan.cuts}
        if self.plan.family is Family.EXPERT:
            copies = [axis for axis in ("ep", "etp") if axis not in cut_axes]
            copies += [] if self.data_dim is not None else ["edp"]
        else:
            copies = [axis for axis in ("tp",) if axis not in cut_axes]
            copies += [] if self.data_dim is not None else ["dp", "cp"]
        return place["pp"] == (self.stages or (0,))[0] and all(place[axis] == 0 for axis in copies)

    def owners(self, fold: Fold, ranks: list[int]) -> list[tuple[int, Box]]:
        """The ranks (out of ``ranks``) that together hold every element exactly once, with their boxes."""
        return [(r, b) for r in ranks if self.is_owner(fold, r) and (b := self.box(fold, r)).numel > 0]

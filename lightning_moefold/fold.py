# SPDX-License-Identifier: Apache-2.0
"""Fold: the sizes of all parallel dimensions, the rules they must obey, and rank arithmetic. Pure Python.

Attention and MoE layers have *different* mappings over the same ranks (MoE Parallel Folding, arXiv 2504.14960)::

    attention   rank = ((pp * DP  + dp ) * CP + cp) * TP  + tp
    MoE         rank = ((pp * EDP + edp) * EP + ep) * ETP + etp

The pipeline dimension is outermost in both, so a pipeline stage is the same set of ranks for both mappings and
``tp * cp * dp == etp * ep * edp`` holds per stage. (The paper's printed listing puts DP outermost, which makes the two
pipeline mappings differ as soon as ``cp * tp != etp * ep``.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Protocol

from lightning_moefold.errors import FoldError

#: Axis orders, outermost first.
ATTENTION_ORDER = ("pp", "dp", "cp", "tp")
MOE_ORDER = ("pp", "edp", "ep", "etp")
AXES = ("tp", "cp", "dp", "pp", "ep", "etp", "edp")
JOINT_AXES = {"dp_cp": ("dp", "cp"), "tp_cp": ("cp", "tp"), "etp_ep": ("ep", "etp")}


class FoldableConfig(Protocol):
    """The fields of a model configuration that :meth:`Fold.validate` reads."""

    @property
    def num_hidden_layers(self) -> int:
        """Number of decoder layers."""
        ...

    @property
    def num_attention_heads(self) -> int:
        """Number of query heads."""
        ...

    @property
    def num_experts(self) -> int:
        """Number of routed experts in an MoE layer; 0 if the model has no MoE layer."""
        ...

    @property
    def dense_widths(self) -> dict[str, int]:
        """Widths of dense feed-forward layers, which are cut over tp, by config field name."""
        ...

    @property
    def expert_widths(self) -> dict[str, int]:
        """Widths of experts, which are cut over etp, by config field name."""
        ...


def divisors(n: int) -> list[int]:
    """Returns all positive divisors of ``n`` in ascending order."""
    return [d for d in range(1, n + 1) if n % d == 0]


def expert_nodes(ep: int, etp: int, node_size: int) -> int:
    """Returns over how many nodes a hierarchical dispatcher can split a group of expert ranks.

    A hierarchical dispatcher sends tokens between nodes first and then within each node. A group of ``etp * ep`` ranks
    is a run of consecutive ranks, and so is a node. The group has two levels if nodes cut it into equal parts, and each
    part has at least two ep ranks with all etp ranks of their experts. That is the case if ``node_size`` divides ``etp
    * ep`` and is a multiple of ``etp``.

    Args:
        ep: Number of ranks over which the experts are spread.
        etp: Number of ranks over which each expert is cut.
        node_size: Number of ranks in a node.

    Returns:
        The number of nodes, with ``ep / nodes`` ep ranks on each; 1 if the group does not have two levels.
    """
    nodes, rest = divmod(ep * etp, node_size)
    return nodes if rest == 0 and node_size % etp == 0 and node_size > etp and nodes > 1 else 1


@dataclass(frozen=True)
class Fold:
    """One legal assignment of ranks to the parallel dimensions.

    ``dp`` and ``edp`` are derived, never given: ``dp = world / (tp * cp * pp)`` and ``edp = world / (etp * ep * pp)``.

    Args:
        world_size: Number of ranks.
        tensor_parallel_size: Number of ranks over which attention and dense feed-forward layers are cut.
        context_parallel_size: Number of ranks over which a sequence is cut.
        pipeline_parallel_size: Number of ranks over which the layers are spread.
        expert_parallel_size: Number of ranks over which the experts of a layer are spread.
        expert_tensor_parallel_size: Number of ranks over which each expert is cut.

    Raises:
        FoldError: If a size is not a positive integer or a product does not divide the world size.

    Example::

        >>> fold = Fold(8, tensor_parallel_size=2, expert_parallel_size=4)
        >>> str(fold), fold.dp, fold.edp
        ('tp2 cp1 dp4 pp1 | etp1 ep4 edp2', 4, 2)
    """

    world_size: int
    tensor_parallel_size: int = 1
    context_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    expert_parallel_size: int = 1
    expert_tensor_parallel_size: int = 1

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            size = getattr(self, name)
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise FoldError(
                    f"{name}={size!r} is not a positive integer; give a number of ranks, 1 to leave it off."
                )
        if self.world_size % self.pp:
            raise FoldError(
                f"pipeline_parallel_size={self.pp} does not divide world_size={self.world_size}; use pipeline_parallel_size in "
                f"{_listed(divisors(self.world_size))}."
            )
        stage = self.world_size // self.pp
        where = f"the {stage} ranks of a stage (world_size={self.world_size} / pp={self.pp})"
        pairs = (
            ("context_parallel_size", "tensor_parallel_size"),
            ("expert_parallel_size", "expert_tensor_parallel_size"),
        )
        for outer, inner in pairs:
            outer_size, inner_size = getattr(self, outer), getattr(self, inner)
            if stage % (outer_size * inner_size):
                legal = [d for d in divisors(stage) if stage % (d * inner_size) == 0]
                hint = f"use {inner} in {_listed(divisors(stage))}"
                if legal:
                    hint = f"with {inner}={inner_size} use {outer} in {_listed(legal)}"
                raise FoldError(
                    f"{inner}={inner_size} x {outer}={outer_size} = {inner_size * outer_size} does not divide {where}; {hint}."
                )

    # ---- sizes -------------------------------------------------------------------------------------------------

    @property
    def tp(self) -> int:
        """Tensor parallel size."""
        return self.tensor_parallel_size

    @property
    def cp(self) -> int:
        """Context parallel size."""
        return self.context_parallel_size

    @property
    def pp(self) -> int:
        """Pipeline parallel size."""
        return self.pipeline_parallel_size

    @property
    def ep(self) -> int:
        """Expert parallel size."""
        return self.expert_parallel_size

    @property
    def etp(self) -> int:
        """Expert tensor parallel size."""
        return self.expert_tensor_parallel_size

    @property
    def dp(self) -> int:
        """Data parallel size of attention and dense layers (derived)."""
        return self.world_size // (self.tp * self.cp * self.pp)

    @property
    def edp(self) -> int:
        """Data parallel size of the experts (derived)."""
        return self.world_size // (self.etp * self.ep * self.pp)

    def size(self, axis: str) -> int:
        """Number of ranks along ``axis`` (a single or a joint one)."""
        total = 1
        for part in JOINT_AXES.get(axis, (axis,)):
            if part not in AXES:
                raise KeyError(f"{axis!r} is no axis of a fold; the axes are {', '.join((*AXES, *JOINT_AXES))}.")
            total *= getattr(self, part)
        return total

    # ---- ranks -------------------------------------------------------------------------------------------------

    def coordinates(self, rank: int) -> dict[str, int]:
        """Returns the coordinate of ``rank`` on each of the seven axes.

        Raises:
            FoldError: If the rank is outside the world.
        """
        if not 0 <= rank < self.world_size:
            raise FoldError(
                f"rank {rank} is not in a world of {self.world_size}; ranks run from 0 to {self.world_size - 1}."
            )
        found: dict[str, int] = {}
        for order in (ATTENTION_ORDER, MOE_ORDER):
            rest = rank
            for axis in reversed(order):
                rest, found[axis] = divmod(rest, self.size(axis))
        return found

    def groups(self, axis: str) -> list[list[int]]:
        """Returns the rank groups of ``axis``, which partition the ranks.

        Args:
            axis: One of ``tp cp dp pp ep etp edp``, or a joint axis ``dp_cp``, ``tp_cp``, ``etp_ep``, whose groups are
                products of two axes, with ranks in ascending order.

        Raises:
            KeyError: If the axis is unknown.
        """
        self.size(axis)  # raises for an unknown name
        parts = JOINT_AXES.get(axis, (axis,))
        order = ATTENTION_ORDER if parts[0] in ATTENTION_ORDER else MOE_ORDER
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            place = self._places[rank]
            groups.setdefault(tuple(place[a] for a in order if a not in parts), []).append(rank)
        return list(groups.values())

    @cached_property
    def _places(self) -> list[dict[str, int]]:
        return [self.coordinates(rank) for rank in range(self.world_size)]

    # ---- models ------------------------------------------------------------------------------------------------

    def validate(self, config: FoldableConfig) -> None:
        """Checks that a model of this ``config`` can be cut by this fold.

        Raises:
            FoldError: If it cannot; the message names the sizes, the broken rule and the nearest legal values.
        """
        if config.num_experts:
            self.check_experts(config.num_experts)
        if self.etp > 1 and getattr(config, "is_packed", False):
            raise FoldError(f"etp={self.etp} would cut experts of uneven widths, which stay whole; use etp=1.")
        for axis, widths in (("tp", config.dense_widths), ("etp", config.expert_widths)):
            for field, width in widths.items():
                self.check_width(axis, field, width)
        self.check_heads("num_attention_heads", config.num_attention_heads)
        if self.pp > config.num_hidden_layers:
            raise FoldError(
                f"pp={self.pp} is more than num_hidden_layers={config.num_hidden_layers}, and every stage needs a layer; "
                f"use pp <= {config.num_hidden_layers}."
            )

    def check_experts(self, num_experts: int) -> None:
        """Raises :class:`FoldError` if the experts do not spread evenly over ep."""
        if num_experts % self.ep:
            raise FoldError(
                f"num_experts={num_experts} does not split evenly over ep={self.ep}; "
                f"use ep in {_listed(divisors(num_experts))}."
            )

    def check_width(self, axis: str, field: str, width: int) -> None:
        """Raises :class:`FoldError` if a feed-forward width does not divide by tp (or etp)."""
        size = self.size(axis)
        if width % size:
            legal = [d for d in divisors(width) if d <= max(2 * size, 8)]
            wider = -(-width // size) * size
            raise FoldError(
                f"{field}={width} does not divide by {axis}={size}; use {axis} in {_listed(legal)}, or a width of {wider}."
            )

    def check_heads(self, field: str, heads: int) -> None:
        """Raises :class:`FoldError` if there are more tp ranks than query heads."""
        if self.tp > heads:
            raise FoldError(f"tp={self.tp} is more than {field}={heads}, and a head is never cut; use tp <= {heads}.")

    @classmethod
    def enumerate(cls, world_size: int, config: FoldableConfig | None = None) -> Iterator[Fold]:
        """Yields every legal fold of ``world_size`` ranks; with ``config``, only folds that can cut this model."""
        for pp in divisors(world_size):
            stage = world_size // pp
            pairs = [(a, b) for a, b in product(divisors(stage), repeat=2) if stage % (a * b) == 0]
            for (tp, cp), (etp, ep) in product(pairs, repeat=2):
                fold = cls(world_size, tp, cp, pp, ep, etp)
                if config is not None:
                    try:
                        fold.validate(config)
                    except FoldError:
                        continue
                yield fold

    # ---- text --------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        attention = " ".join(f"{axis}{self.size(axis)}" for axis in ("tp", "cp", "dp", "pp"))
        return attention + " | " + " ".join(f"{axis}{self.size(axis)}" for axis in ("etp", "ep", "edp"))

    @classmethod
    def parse(cls, text: str, world_size: int) -> Fold:
        """Reads a fold such as ``"tp2 cp2 pp2 | ep4"``.

        Axes left out are 1, and the bar is optional. ``dp`` and ``edp`` may be given, but must equal their derived
        values.

        Raises:
            FoldError: If a word is unknown, an axis is given twice, the fold is illegal, or ``dp`` or ``edp`` is wrong.
        """
        sizes: dict[str, int] = {}
        for word in text.replace("|", " ").replace(",", " ").split():
            match = re.fullmatch(r"([a-z]+)=?(\d+)", word.lower())
            if match is None or match[1] not in AXES:
                raise FoldError(
                    f"{word!r} in fold {text!r} is not an axis and a size; write it like 'tp2 cp1 pp2 | etp1 ep4'."
                )
            if match[1] in sizes:
                raise FoldError(f"fold {text!r} gives {match[1]} twice; name each axis once.")
            sizes[match[1]] = int(match[2])
        derived = {axis: sizes.pop(axis) for axis in ("dp", "edp") if axis in sizes}
        fold = cls(world_size, *(sizes.get(axis, 1) for axis in ("tp", "cp", "pp", "ep", "etp")))
        for axis, size in derived.items():
            if fold.size(axis) != size:
                raise FoldError(
                    f"fold {text!r} says {axis}{size}, but {world_size} ranks make it {axis}{fold.size(axis)}; "
                    f"leave {axis} out, it is derived."
                )
        return fold

    @classmethod
    def first(cls, texts: Sequence[str], world_size: int) -> Fold:
        """Returns the first of several folds, in order of preference, that so many ranks can form.

        Args:
            texts: The folds, as :meth:`parse` reads them.
            world_size: Number of ranks.

        Raises:
            FoldError: If there is none; a sentence for each fold says why.
        """
        reasons = []
        for text in texts:
            try:
                return cls.parse(text, world_size)
            except FoldError as error:
                reasons.append(f"{text!r}: {error}")
        raise FoldError(f"{world_size} ranks can form none of the folds: {' '.join(reasons)}")

    def table(self, max_ranks: int = 64) -> str:
        """Returns a printable rank map: every rank's coordinates in both mappings, and the groups of each axis.

        Args:
            max_ranks: Number of ranks printed; the rest is left out.
        """
        head = (
            " rank | "
            + " ".join(f"{a:>3}" for a in ATTENTION_ORDER)
            + " | "
            + " ".join(f"{a:>3}" for a in MOE_ORDER[1:])
        )
        lines = [f"{self}   ({self.world_size} ranks)", "", "      | attention       | experts", head, "-" * len(head)]
        for rank in range(min(self.world_size, max_ranks)):
            place = self._places[rank]
            attention = " ".join(f"{place[a]:>3}" for a in ATTENTION_ORDER)
            lines.append(f" {rank:>4} | {attention} | " + " ".join(f"{place[a]:>3}" for a in MOE_ORDER[1:]))
        if self.world_size > max_ranks:
            lines.append(f"  ... | {self.world_size - max_ranks} more ranks")
        lines.append("")
        for axis in AXES:
            if self.size(axis) > 1:
                groups = self.groups(axis)
                shown = "  ".join(_compact(group) for group in groups[:8]) + ("  ..." if len(groups) > 8 else "")
                lines.append(f" {axis:>3} groups: {shown}")
        return "\n".join(lines)


def _listed(values: list[int]) -> str:
    return ",".join(map(str, values[:12])) + (",..." if len(values) > 12 else "")


def _compact(ranks: list[int]) -> str:
    shown = " ".join(map(str, ranks[:8]))
    return f"[{shown} ...]" if len(ranks) > 8 else f"[{shown}]"

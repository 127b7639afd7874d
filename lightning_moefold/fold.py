# SPDX-License-Identifier: Apache-2.0
"""Fold: the sizes of every parallel dimension, their laws, and rank arithmetic. Pure Python.

Attention and MoE layers have *different* mappings over the same ranks (MoE Parallel Folding, arXiv 2504.14960)::

    attention   rank = ((pp * DP  + dp ) * CP + cp) * TP  + tp
    MoE         rank = ((pp * EDP + edp) * EP + ep) * ETP + etp

The pipeline dimension is outermost in both, so a pipeline stage is the same set of ranks for both mappings and
``tp * cp * dp == etp * ep * edp`` holds per stage. (The paper's printed listing puts DP outermost, which makes the two
pipeline mappings differ as soon as ``cp * tp != etp * ep``.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator
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
    """What :meth:`Fold.validate` needs to know of a model."""

    @property
    def num_hidden_layers(self) -> int:
        """Decoder layers."""
        ...

    @property
    def num_attention_heads(self) -> int:
        """Query heads."""
        ...

    @property
    def num_experts(self) -> int:
        """Routed experts of an MoE layer; 0 where there is none."""
        ...

    @property
    def dense_widths(self) -> dict[str, int]:
        """Feed-forward widths that are cut over tp, by config field name."""
        ...

    @property
    def expert_widths(self) -> dict[str, int]:
        """Feed-forward widths that are cut over etp, by config field name."""
        ...


def divisors(n: int) -> list[int]:
    """All positive divisors of ``n`` in ascending order."""
    return [d for d in range(1, n + 1) if n % d == 0]


def expert_nodes(ep: int, etp: int, node_size: int) -> int:
    """Nodes over which the experts of a layer lie where tokens can travel between nodes first and then within each.

    A group of ``etp * ep`` ranks is a run of consecutive ones, and so is a node. Every such group has two levels where nodes
    cut it into equal parts, each with two ep ranks or more and all the etp ranks of their experts: where ``node_size``
    divides ``etp * ep`` and is a multiple of ``etp``.

    Args:
        ep: Ranks over which the experts are spread.
        etp: Ranks over which each is cut.
        node_size: Ranks of a node.

    Returns:
        The number of nodes, with ``ep / nodes`` ep ranks on each; 1 where there are no two levels.
    """
    nodes, rest = divmod(ep * etp, node_size)
    return nodes if rest == 0 and node_size % etp == 0 and node_size > etp and nodes > 1 else 1


@dataclass(frozen=True)
class Fold:
    """One legal assignment of ranks to the parallel dimensions.

    ``dp`` and ``edp`` are derived, never given: ``dp = world / (tp * cp * pp)`` and ``edp = world / (etp * ep * pp)``.

    Args:
        world_size: Number of ranks.
        tensor_parallel_size: Ranks over which attention and dense feed-forward layers are cut.
        context_parallel_size: Ranks over which a sequence is cut.
        pipeline_parallel_size: Pipeline stages.
        expert_parallel_size: Ranks over which the experts of a layer are spread.
        expert_tensor_parallel_size: Ranks over which each expert is cut.

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
        self._check_division("pipeline_parallel_size", self.pp, self.world_size, f"world_size={self.world_size}")
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

    @staticmethod
    def _check_division(name: str, size: int, total: int, what: str) -> None:
        if total % size:
            raise FoldError(f"{name}={size} does not divide {what}; use {name} in {_listed(divisors(total))}.")

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
        """The coordinate of ``rank`` on each of the seven axes.

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
        """The process groups of ``axis``: a partition of the ranks.

        Args:
            axis: One of ``tp cp dp pp ep etp edp``, or a joint axis ``dp_cp``, ``tp_cp``, ``etp_ep`` (product groups,
                in the order of the ranks).

        Raises:
            KeyError: For an unknown axis.
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
            FoldError: Naming the sizes, the rule that fails, and the nearest legal values.
        """
        if config.num_experts:
            self.check_experts(config.num_experts)
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
            raise FoldError(f"{field}={width} does not divide by {axis}={size}; use {axis} in {_listed(legal)}.")

    def check_heads(self, field: str, heads: int) -> None:
        """Raises :class:`FoldError` if there are more tp ranks than query heads."""
        if self.tp > heads:
            raise FoldError(f"tp={self.tp} is more than {field}={heads}, and a head is never cut; use tp <= {heads}.")

    @classmethod
    def enumerate(cls, world_size: int, config: FoldableConfig | None = None) -> Iterator[Fold]:
        """Every legal fold of ``world_size`` ranks, and of ``config`` where one is given."""
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

        Axes left out are 1, the bar is optional, and ``dp`` and ``edp`` may be given only as what they are derived to
        be.

        Raises:
            FoldError: For an unknown word, an axis given twice, an illegal fold, or a wrong ``dp`` or ``edp``.
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

    def table(self, max_ranks: int = 64) -> str:
        """A rank map that a person can read: every rank's place in both mappings, and the groups of each axis.

        Args:
            max_ranks: Rows printed before the rest is left out.
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


def _listed(values: list[int], most: int = 12) -> str:
    return ",".join(map(str, values[:most])) + (",..." if len(values) > most else "")


def _compact(ranks: list[int], most: int = 8) -> str:
    shown = " ".join(map(str, ranks[:most]))
    return f"[{shown} ...]" if len(ranks) > most else f"[{shown}]"

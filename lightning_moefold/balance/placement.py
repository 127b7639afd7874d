# SPDX-License-Identifier: Apache-2.0
"""Which part of an expert parallel group holds which expert of a layer. Pure Python and NumPy.

The experts of a layer have *logical* numbers, which router, counts, losses and checkpoints use, and lie in *slots*, which
dispatchers and stacks of parameters use:

    slot = part * (E / parts) + place in the part's stack

Legend: E experts, P parts (ep ranks), S slots (as many as experts).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_moefold.errors import InputError


@dataclass(frozen=True)
class Placement:
    """The slots of one layer's experts.

    Args:
        expert_of_slot: Logical number of the expert in each slot; every expert comes once.
        parts: P, the ranks over which the experts are spread (ep); the same number of slots belongs to each.

    Raises:
        InputError: If ``expert_of_slot`` is no permutation, or the slots do not spread evenly over the parts.

    Example::

        >>> placement = Placement((0, 3, 2, 1), parts=2)
        >>> placement.part_of_expert
        (0, 1, 1, 0)
    """

    expert_of_slot: tuple[int, ...]
    parts: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "expert_of_slot", tuple(int(expert) for expert in self.expert_of_slot))
        experts = len(self.expert_of_slot)
        if sorted(self.expert_of_slot) != list(range(experts)):
            raise InputError(
                f"a placement of {experts} experts must name each of 0 to {experts - 1} once, which {_shown(self.expert_of_slot)} "
                "does not; give a permutation."
            )
        if self.parts < 1 or experts % self.parts:
            raise InputError(
                f"{experts} experts do not spread evenly over {self.parts} parts; use a number of parts that divides {experts}."
            )

    @classmethod
    def contiguous(cls, num_experts: int, parts: int) -> Placement:
        """The placement with which every run begins: expert e in slot e."""
        return cls(tuple(range(num_experts)), parts)

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.expert_of_slot)

    @property
    def slots_per_part(self) -> int:
        """E / P."""
        return self.num_experts // self.parts

    @property
    def is_contiguous(self) -> bool:
        """Whether every expert is in the slot of its number."""
        return self.expert_of_slot == tuple(range(self.num_experts))

    @cached_property
    def slot_of_expert(self) -> tuple[int, ...]:
        """Slot of each expert."""
        return tuple(np.argsort(self.expert_of_slot).tolist())

    @cached_property
    def part_of_expert(self) -> tuple[int, ...]:
        """Part of each expert."""
        return tuple(slot // self.slots_per_part for slot in self.slot_of_expert)

    def experts_of_part(self, part: int) -> tuple[int, ...]:
        """Experts of one part, in the order of its stack."""
        return self.expert_of_slot[part * self.slots_per_part : (part + 1) * self.slots_per_part]

    def part_load(self, load_E: ArrayLike) -> NDArray[np.float64]:
        """Load of each part, ``[..., P]``, where experts have the load ``[..., E]``."""
        load = np.asarray(load_E, dtype=np.float64)[..., list(self.expert_of_slot)]
        return load.reshape(*load.shape[:-1], self.parts, self.slots_per_part).sum(-1)

    def renumbered(self, previous: Placement) -> Placement:
        """The same experts on the same parts, in slots chosen so that what stays on its part stays in its slot.

        Newcomers take the slots that are left, in the order of their numbers.

        Args:
            previous: The placement that this one is to follow; of as many experts and parts.
        """
        check_successor(previous, self)
        slots: list[int] = []
        for part in range(self.parts):
            here = set(self.experts_of_part(part))
            newcomers = iter(sorted(here - set(previous.experts_of_part(part))))
            slots += [old if old in here else next(newcomers) for old in previous.experts_of_part(part)]
        return Placement(tuple(slots), self.parts)

    def moved(self, previous: Placement) -> int:
        """How many experts are on another part than they were in ``previous``."""
        return sum(a != b for a, b in zip(self.part_of_expert, previous.part_of_expert, strict=True))


def check_successor(previous: Placement, placement: Placement) -> None:
    """Checks that a placement can follow another.

    Raises:
        InputError: If the numbers of experts or parts differ.
    """
    if (previous.num_experts, previous.parts) != (placement.num_experts, placement.parts):
        raise InputError(
            f"a placement of {placement.num_experts} experts on {placement.parts} parts cannot follow one of "
            f"{previous.num_experts} experts on {previous.parts}; make it for the layer's experts and ep."
        )


def _shown(values: Sequence[int], most: int = 12) -> str:
    return f"({', '.join(map(str, values[:most]))}{', ...' if len(values) > most else ''})"

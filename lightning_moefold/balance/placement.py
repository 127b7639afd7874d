# SPDX-License-Identifier: Apache-2.0
"""Where each expert of a layer lives. Pure Python."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from lightning_moefold.errors import InputError


@dataclass(frozen=True)
class Placement:
    """Homes of a layer's experts: slot ``part * (E / parts) + local`` holds expert ``expert_of_slot[slot]``.

    Args:
        expert_of_slot: A permutation of the experts.
        parts: Ranks over which they lie, each with equally many slots.

    Raises:
        InputError: If it is no permutation, or the parts do not divide it.
    """

    expert_of_slot: tuple[int, ...]
    parts: int

    def __post_init__(self) -> None:
        if sorted(self.expert_of_slot) != list(range(len(self.expert_of_slot))):
            raise InputError(f"expert_of_slot={self.expert_of_slot} is no permutation of the experts; name each once.")
        if self.parts < 1 or len(self.expert_of_slot) % self.parts:
            raise InputError(f"{len(self.expert_of_slot)} experts do not lie evenly on {self.parts} parts.")

    @classmethod
    def contiguous(cls, num_experts: int, parts: int) -> Placement:
        """Expert e in slot e."""
        return cls(tuple(range(num_experts)), parts)

    @cached_property
    def slot_of_expert(self) -> tuple[int, ...]:
        """Slot of each expert."""
        slots = [0] * len(self.expert_of_slot)
        for slot, expert in enumerate(self.expert_of_slot):
            slots[expert] = slot
        return tuple(slots)

    @cached_property
    def part_of_expert(self) -> tuple[int, ...]:
        """Part on which each expert lives."""
        local = len(self.expert_of_slot) // self.parts
        return tuple(slot // local for slot in self.slot_of_expert)

    def renumbered(self, previous: Placement) -> Placement:
        """The same parts, with slots numbered so that an expert that stays on its part keeps its slot."""
        local = len(self.expert_of_slot) // self.parts
        slots: list[int | None] = [None] * len(self.expert_of_slot)
        arrived: list[list[int]] = [[] for _ in range(self.parts)]
        for expert, part in enumerate(self.part_of_expert):
            if previous.part_of_expert[expert] == part:
                slots[previous.slot_of_expert[expert]] = expert
            else:
                arrived[part].append(expert)
        for part, experts in enumerate(arrived):
            free = (slot for slot in range(part * local, (part + 1) * local) if slots[slot] is None)
            for slot, expert in zip(free, experts, strict=False):
                slots[slot] = expert
        return Placement(tuple(expert for expert in slots if expert is not None), self.parts)

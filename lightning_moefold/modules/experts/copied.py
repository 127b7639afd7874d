# SPDX-License-Identifier: Apache-2.0
"""Weights of experts to the ranks that have copies of them for one pass, and gradients of the copies back.

The owner alone has the parameter and its gradient: a copy is an input of the pass like a token, and what its gradient comes to
is added to the owner's on the way back. Forward keeps copies for backward; where a layer is recomputed they are sent again.

What is here stands on the way of the weights alone and runs once in a backward that is split in two (for inputs, then for
weights); and inside the forward of the experts' FSDP unit, or FSDP2 would see no gradient of theirs. All ranks take part, those
without a copy too, as long as one rank has one.

Legend: L experts at home, N experts lent (an expert counts for every rank that has a copy), C copies here, W numbers of an
expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_moefold.async_comm import Exchange, Handle, start, wait
from lightning_moefold.balance.copies import CopyPlan
from lightning_moefold.mesh import Axis


@dataclass(frozen=True)
class Borrowed:
    """Copies on their way to this rank.

    Args:
        packed: Experts as rows of numbers, one tensor for each kind of parameter; not to be read yet.
        handle: In which they are under way.
        kinds: The stacks that each of them holds parts of.
        shapes: Of an expert's part in each stack.
    """

    packed: tuple[Tensor, ...] = ()
    handle: Handle | None = None
    kinds: tuple[tuple[int, ...], ...] = ()
    shapes: tuple[torch.Size, ...] = ()

    def arrive(self) -> tuple[Tensor, ...]:
        """Waits for them: a stack of C copies for each stack of experts, none of them copied again."""
        stacks: dict[int, Tensor] = {}
        for packed_CW, members in zip(wait(self.packed, self.handle), self.kinds, strict=True):
            parts = packed_CW.split([self.shapes[i].numel() for i in members], dim=1)
            stacks |= {i: part.unflatten(1, self.shapes[i]) for i, part in zip(members, parts, strict=True)}
        return tuple(stacks[i] for i in range(len(self.shapes)))


class _Lend(torch.autograd.Function):
    """Stacks of one kind as they are, and beside them the rows of numbers of those experts that others want."""

    @staticmethod
    def forward(ctx: Any, lent: list[int], *stacks: Tensor) -> tuple[Tensor, ...]:
        ctx.lent, ctx.shapes = lent, [stack.shape[1:] for stack in stacks]
        sizes = [shape.numel() for shape in ctx.shapes]
        packed_NW = stacks[0].new_empty(len(lent), sum(sizes))
        for part_NW, stack in zip(packed_NW.split(sizes, dim=1), stacks, strict=True):
            for row, expert in zip(part_NW, lent, strict=True):
                row.copy_(stack[expert].reshape(-1))
        return (*(stack.view_as(stack) for stack in stacks), packed_NW)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *stacks, packed_NW = grads
        parts = packed_NW.split([shape.numel() for shape in ctx.shapes], dim=1)
        # In place: kernels made these gradients for this node, and a copy of a stack is what copies of experts are to avoid.
        for stack, part_NW in zip(stacks, parts, strict=True):
            for row, expert in zip(part_NW, ctx.lent, strict=True):
                stack[expert].add_(row.view(stack.shape[1:]))
        return None, *stacks


def lend(stacks: tuple[Tensor, ...], plan: CopyPlan | None, ep: Axis) -> tuple[tuple[Tensor, ...], Borrowed]:
    """Sends off the experts of which other ranks have copies.

    Args:
        stacks: Parameters of the experts at home, ``[L, ...]`` each.
        plan: Which rank has a copy of which.
        ep: The axis among whose ranks the experts are spread.

    Returns:
        The stacks, to compute with in place of ``stacks``, and the copies that this rank is to have.
    """
    if plan is None or not plan.copies:
        return stacks, Borrowed()
    lent, first_L = plan.lent(ep.index), plan.local_experts
    owners = [expert // first_L for expert in plan.borrowed(ep.index)]
    route = Exchange([len(experts) for experts in lent], [owners.count(rank) for rank in range(ep.size)])
    flat = [expert for experts in lent for expert in experts]
    at_home, packed, kinds = list(stacks), [], _kinds(stacks)
    for members in kinds:
        *kept, packed_NW = _Lend.apply(flat, *(stacks[i] for i in members))
        packed.append(packed_NW)
        for i, stack in zip(members, kept, strict=True):
            at_home[i] = stack
    promised, handle = start(packed, [route] * len(packed), ep, yields=False)
    return tuple(at_home), Borrowed(promised, handle, kinds, tuple(stack.shape[1:] for stack in stacks))


def bytes_of_copy(stacks: Sequence[Tensor]) -> int:
    """Bytes of an expert's parameters, and of the gradients of those that are trained."""
    return sum(stack[:1].nbytes * (1 + stack.requires_grad) for stack in stacks)


def _kinds(stacks: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
    """Stacks that can travel as one: of the same dtype, all trained or all frozen. In an order that all ranks share."""
    kinds: dict[tuple[torch.dtype, bool], list[int]] = {}
    for i, stack in enumerate(stacks):
        kinds.setdefault((stack.dtype, stack.requires_grad), []).append(i)
    return tuple(map(tuple, kinds.values()))

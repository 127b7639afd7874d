# SPDX-License-Identifier: Apache-2.0
"""Moves experts to other ranks between two optimizer steps, with everything that belongs to them.

A stack of experts has a row for each slot. Parameters, their gradients where there are any, and every tensor of the optimizers
that has such rows, too (moments, float32 masters), give their rows away in one exchange of bytes over the ranks of a stage:
nothing is computed, so in logical order every bit stays as it was. What holds for all experts together, such as a count of
steps, stays.

Every rank takes part, with the same placements: also ranks of other pipeline stages, whose layouts tell of all layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from lightning_moefold import comm
from lightning_moefold.agreement import agree_on_error
from lightning_moefold.balance.moves import Move, Row, plan_moves
from lightning_moefold.balance.placement import Placement, check_successor
from lightning_moefold.errors import InputError, UnsupportedFeature
from lightning_moefold.mesh import Axis, FoldedMesh
from lightning_moefold.modules.moe import MoELayer
from lightning_moefold.parallel.gradients import local_part
from lightning_moefold.parallel.parameters import ParameterRegistry

#: Bytes that a rank sends or receives at once, so that a move of many experts needs no more memory beside the model.
EXCHANGE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Moved:
    """What a migration has done.

    Args:
        experts: Experts that are on another rank now, over the layers of this pipeline stage.
        sent_bytes: Bytes that this rank has sent to others.
    """

    experts: int
    sent_bytes: int


@dataclass(frozen=True)
class _Stack:
    """A tensor with a row for each expert here, and what happens to the rows of such tensors.

    Args:
        what: Its name in messages.
        rows: This rank's piece.
        moves: Sender, its row, receiver, its row; ranks as places in the stage.
    """

    what: str
    rows: Tensor
    moves: Sequence[tuple[int, int, int, int]]

    @property
    def row_bytes(self) -> int:
        return self.rows.element_size() * torch.Size(self.rows.shape[1:]).numel()

    @property
    def most(self) -> int:
        """Bytes that any rank sends or receives at most."""
        counts = Counter(sender for sender, *_ in self.moves), Counter(receiver for _, _, receiver, _ in self.moves)
        return self.row_bytes * max((max(count.values(), default=0) for count in counts), default=0)


@torch.no_grad()
def move_experts(
    registry: ParameterRegistry, optimizers: Sequence[Optimizer], placements: Mapping[str, Placement]
) -> Moved:
    """Brings the experts of some layers to where the placements say, with the state of the optimizers. Collective.

    Args:
        registry: Of the module; learns the placements.
        optimizers: Whose state moves along.
        placements: By the layers' names in the LightningModule, the same on every rank.

    Raises:
        InputError: For a layer that no rank has, a placement of other experts or parts, or ranks that differ in what they hold.
        UnsupportedFeature: For state of an optimizer that is not kept expert by expert. Nothing has moved then.
    """
    mesh = registry.mesh
    stacks: list[_Stack] = []
    experts = 0
    error: Exception | None = None
    try:
        layers = registry.moe_layers()
        changes = {
            name: (layers[name].placement, placement) for name, placement in placements.items() if name in layers
        }
        for name, (before, after) in changes.items():
            check_successor(before, after)
            if after != before:
                check_movable(name, layers[name])
            experts += after.moved(before)
        stacks = _find_stacks(registry, optimizers, changes)
    except Exception as failure:  # peers are about to wait
        error = failure
    _agree(error, placements, registry, stacks)
    sent = 0
    for batch in _batches(stacks):
        sent += _exchange(batch, mesh.stage)
    registry.place_experts(placements)
    return Moved(experts, sent)


def check_movable(name: str, layer: MoELayer) -> None:
    """Checks that a layer's experts can move.

    Raises:
        UnsupportedFeature: Saying what keeps them.
    """
    if (reason := layer.experts.bound_to_place(layer.hidden_size)) is not None:
        raise UnsupportedFeature(
            f"experts of {name} cannot move to other ranks: {reason}; change that, or leave ExpertRebalancer out."
        )


def drop_gradients(registry: ParameterRegistry, layers: Collection[str]) -> None:
    """Lets go of the gradients of some layers' experts, which a step has used, so that they need not move."""
    for name, parameter in registry.expert_stacks().items():
        if any(name.startswith(f"{layer}.") for layer in layers):
            parameter.grad = None


def size_of_expert(registry: ParameterRegistry, optimizers: Sequence[Optimizer]) -> tuple[int, int]:
    """Of an expert of any layer here, at most: weights that this rank computes with, and bytes that move with it from here."""
    weights: Counter[str] = Counter()
    held: Counter[str] = Counter()
    mesh = registry.mesh
    for name, parameter in registry.expert_stacks().items():
        layer, layout = name.rpartition(".experts.")[0], registry.layouts[name]
        weights[layer] += torch.Size(layout.tensor_box(mesh.place).sizes[1:]).numel()
        for what, rows in _tensors_of(name, parameter, optimizers):
            if what != f"{name}.grad":
                held[layer] += rows.element_size() * torch.Size(rows.shape[1:]).numel()
    return max(weights.values(), default=0), max(held.values(), default=0)


# ---- what moves ------------------------------------------------------------------------------------------------------


def _find_stacks(
    registry: ParameterRegistry,
    optimizers: Sequence[Optimizer],
    changes: Mapping[str, tuple[Placement, Placement]],
) -> list[_Stack]:
    mesh = registry.mesh
    places = _stage_places(mesh)
    stacks: list[_Stack] = []
    located: dict[tuple[str, bool], list[tuple[int, int, int, int]]] = {}
    for name, parameter in registry.expert_stacks().items():
        layer = next((layer for layer in changes if name.startswith(f"{layer}.")), None)
        if layer is None:
            continue
        cut = registry.layouts[name].data_dim == 0
        if (layer, cut) not in located:
            moves = plan_moves(*changes[layer], mesh.fold.edp, cut)
            located[layer, cut] = [_locate(move, places, mesh) for move in moves]
        if located[layer, cut]:
            tensors = _tensors_of(name, parameter, optimizers)
            stacks += [_Stack(what, rows, located[layer, cut]) for what, rows in tensors]
    return stacks


def _tensors_of(name: str, parameter: nn.Parameter, optimizers: Sequence[Optimizer]) -> Iterator[tuple[str, Tensor]]:
    piece = local_part(parameter)
    yield name, piece
    if parameter.grad is not None:
        yield f"{name}.grad", local_part(parameter.grad)
    for optimizer in optimizers:
        if parameter not in optimizer.state:
            continue
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, Tensor):
                state = local_part(value)
                if state.dim() == piece.dim() and state.shape[0] == piece.shape[0]:
                    yield f"{name}.{key}", state
                    continue
            if any(isinstance(leaf, Tensor) and leaf.numel() != 1 for leaf in tree_leaves(value)):
                raise UnsupportedFeature(_immovable(optimizer, name, key, value))


def _immovable(optimizer: Optimizer, name: str, key: Any, value: Any) -> str:
    shape = f" of shape {list(value.shape)}" if isinstance(value, Tensor) else ""
    return (
        f"{type(optimizer).__name__} keeps {key!r}{shape} for {name!r}, whose first dimension does not count experts, so it cannot "
        "move with them; use an optimizer with state for each element, such as AdamW, or no ExpertRebalancer."
    )


def _stage_places(mesh: FoldedMesh) -> dict[tuple[int, int], int]:
    """Place in the stage of the ranks with this rank's part of each expert, by their places on ep and edp."""
    places = {}
    for index, rank in enumerate(mesh.stage.ranks):
        place = mesh.fold.coordinates(rank)
        if place["etp"] == mesh.place["etp"]:
            places[place["ep"], place["edp"]] = index
    return places


def _locate(move: Move, places: Mapping[tuple[int, int], int], mesh: FoldedMesh) -> tuple[int, int, int, int]:
    def rank(row: Row) -> int:
        return places[row.ep, mesh.place["edp"] if row.edp is None else row.edp]

    return rank(move.source), move.source.row, rank(move.target), move.target.row


def _agree(
    error: Exception | None, placements: Mapping[str, Placement], registry: ParameterRegistry, stacks: list[_Stack]
) -> None:
    """Raises on all ranks if any has an error, if nobody has a layer, or if ranks of a stage would exchange different things."""
    mesh = registry.mesh
    held = [(stack.what, str(stack.rows.dtype), tuple(stack.rows.shape[1:])) for stack in stacks]
    mine = mesh.place["pp"], held, set(registry.moe_layers()), dict(placements)
    everyone = comm.all_gather_objects(mine, mesh.world)
    if error is None:
        unknown = sorted(set(placements) - set().union(*(names for _, _, names, _ in everyone)))
        others = next((held for stage, held, _, _ in everyone if stage == mine[0] and held != mine[1]), None)
        if any(wanted != mine[3] for *_, wanted in everyone):
            error = InputError("ranks were given different placements of experts; decide from what all ranks know.")
        elif unknown:
            error = InputError(f"no rank has a MoE layer {unknown[0]!r}; name it as named_modules() does.")
        elif others is not None:
            what = next((a for a, b in zip(held, others, strict=False) if a != b), (held + others)[-1:])
            error = InputError(
                f"ranks hold different things for their experts ({what}); move experts after a step of the optimizer on all ranks."
            )
    agree_on_error(error, mesh.world)


# ---- the exchange ----------------------------------------------------------------------------------------------------


def _batches(stacks: Sequence[_Stack]) -> Iterator[list[_Stack]]:
    """Stacks that are exchanged together; the same on every rank of a stage."""
    batch: list[_Stack] = []
    size = 0
    for stack in stacks:
        if batch and size + stack.most > EXCHANGE_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(stack)
        size += stack.most
    if batch:
        yield batch


def _exchange(stacks: Sequence[_Stack], stage: Axis) -> int:
    """One exchange of rows, as bytes; those that stay on a rank pass through it, too. Returns the bytes sent to others."""
    outgoing: list[list[Tensor]] = [[] for _ in stage.ranks]
    incoming: list[list[Tensor]] = [[] for _ in stage.ranks]
    for stack in stacks:
        for sender, source, receiver, target in stack.moves:
            if sender == stage.index:
                outgoing[receiver].append(stack.rows[source])
            if receiver == stage.index:
                incoming[sender].append(stack.rows[target])
    sent, received = ([sum(row.nbytes for row in rows) for rows in peers] for peers in (outgoing, incoming))
    device = stacks[0].rows.device
    parts = [_bytes_of(row).to(device) for rows in outgoing for row in rows]
    packed = torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8, device=device)
    del parts
    arrived = comm.all_to_all_raw(packed, sent, received, stage)
    targets = [row for rows in incoming for row in rows]
    for row, part in zip(targets, arrived.split([row.nbytes for row in targets]), strict=True):
        content = torch.empty(row.shape, dtype=row.dtype, device=part.device)
        content.reshape(-1).view(torch.uint8).copy_(part)  # a slice of bytes need not be aligned for its dtype
        row.copy_(content)
    return sum(sent) - sent[stage.index]


def _bytes_of(row: Tensor) -> Tensor:
    return row.contiguous().reshape(-1).view(torch.uint8)

# SPDX-License-Identifier: Apache-2.0
"""Assembles whole tensors from the pieces that ranks return, to compare a fold with one process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_moefold.fold import Fold
from lightning_moefold.layout import ParameterLayout, split_boxes
from lightning_moefold.modules.base import ParallelRoot, parallel_roots
from lightning_moefold.parallel import local_part
from lightning_moefold.parallel.network.runner import NetworkRunner, network_runners

#: Offsets of the parts of a piece in the whole tensor, the whole tensor's shape, and these parts.
Piece = tuple[tuple[tuple[int, ...], ...], tuple[int, ...], tuple[Tensor, ...]]


def owned_pieces(module: nn.Module, what: Literal["weight", "grad"] = "weight") -> dict[str, Piece]:
    """Returns the pieces of all parameters (or gradients) that this rank owns; over all ranks each element occurs once.

    A parameter without gradient is left out.

    Args:
        module: A language model, or a module that holds models, blocks and other parameters.
        what: Whether to return weights or gradients.
    """
    layouts: dict[int, tuple[ParallelRoot | NetworkRunner, ParameterLayout]] = {}
    for _, root in parallel_roots(module):
        root.release_gathered_weights()
        layouts |= {id(p): (root, root.layouts[name]) for name, p in root.named_parameters()}
    for _, runner in network_runners(module):
        own = runner.network.module.named_parameters()
        layouts |= {id(p): (runner, runner.layouts[name]) for name, p in own if name in runner.layouts}
    pieces: dict[str, Piece] = {}
    for name, parameter in module.named_parameters():
        value = parameter.grad if what == "grad" else parameter
        if value is None:
            continue
        piece = local_part(value).clone()
        if id(parameter) not in layouts:
            if not dist.is_initialized() or dist.get_rank() == 0:
                pieces[name] = (((0,) * piece.dim(),), tuple(piece.shape), (piece,))
            continue
        owner, layout = layouts[id(parameter)]
        if layout.is_owner(owner.fold, owner.rank):
            pieces[name] = piece_of(piece, layout, owner.fold, owner.rank)
    return pieces


def piece_of(piece: Tensor, layout: ParameterLayout, fold: Fold, rank: int) -> Piece:
    """What a rank stores of a tensor, with where it belongs."""
    boxes = layout.boxes(fold, rank)
    return tuple(box.offsets for box in boxes), layout.shape, split_boxes(piece, boxes)


def assemble(pieces_of_ranks: Iterable[Mapping[str, Piece]]) -> dict[str, Tensor]:
    """Assembles the pieces of all ranks.

    Raises:
        AssertionError: If an element is missing or occurs twice.
    """
    whole: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    for pieces in pieces_of_ranks:
        for name, (starts, shape, parts) in pieces.items():
            if name not in whole:
                whole[name] = torch.zeros(shape, dtype=parts[0].dtype)
                seen[name] = torch.zeros(shape, dtype=torch.int64)
            for offsets, part in zip(starts, parts, strict=True):
                place = tuple(slice(start, start + size) for start, size in zip(offsets, part.shape, strict=True))
                whole[name][place] = part
                seen[name][place] += 1
    for name, times in seen.items():
        assert bool((times == 1).all()), (
            f"{name}: some elements came {int(times.min())} or {int(times.max())} times, not once"
        )
    return whole

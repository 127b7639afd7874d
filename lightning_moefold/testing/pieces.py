# SPDX-License-Identifier: Apache-2.0
"""Whole tensors from the pieces that ranks return: the other half of comparing a fold with one process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from lightning_moefold.models import MoECausalLM
from lightning_moefold.parallel import local_part

#: Offsets of a piece in the whole tensor, the whole tensor's shape, and the piece.
Piece = tuple[tuple[int, ...], tuple[int, ...], Tensor]


def owned_pieces(model: MoECausalLM, what: Literal["weight", "grad"] = "weight") -> dict[str, Piece]:
    """The pieces of all parameters (or gradients) that this rank owns; over all ranks each element comes once.

    A parameter without gradient is left out.
    """
    model.release_gathered_weights()
    pieces: dict[str, Piece] = {}
    for name, parameter in model.named_parameters():
        layout = model.layouts[name]
        value = parameter.grad if what == "grad" else parameter
        if value is not None and layout.is_owner(model.fold, model.rank):
            pieces[name] = (layout.box(model.fold, model.rank).offsets, layout.shape, local_part(value).clone())
    return pieces


def assemble(pieces_of_ranks: Iterable[Mapping[str, Piece]]) -> dict[str, Tensor]:
    """Puts the pieces of all ranks together.

    Raises:
        AssertionError: If an element is missing or comes twice.
    """
    whole: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    for pieces in pieces_of_ranks:
        for name, (offsets, shape, piece) in pieces.items():
            if name not in whole:
                whole[name] = torch.zeros(shape, dtype=piece.dtype)
                seen[name] = torch.zeros(shape, dtype=torch.int64)
            place = tuple(slice(start, start + size) for start, size in zip(offsets, piece.shape, strict=True))
            whole[name][place] = piece
            seen[name][place] += 1
    for name, times in seen.items():
        assert bool((times == 1).all()), (
            f"{name}: some elements came {int(times.min())} or {int(times.max())} times, not once"
        )
    return whole

# SPDX-License-Identifier: Apache-2.0
"""Positions of A and B in PEFT's files, fused or separate for each expert. Pure functions of tensors.

A file with fused experts wraps one parameter after the other, so gate and up are one ``base_layer`` deeper::

    <module>.lora_A.weight                      [R, in]       of attention, dense layers and routers
    <module>.lora_B.weight                      [out, R]
    <module>.lora_magnitude_vector              [out]         with DoRA
    <experts>.base_layer.lora_A.weight          [E * R, D]    of gate and up; row e * R + j
    <experts>.base_layer.lora_B.weight          [2F, R * E]   column j * E + e: another order than A's
    <experts>.lora_A.weight                     [E * R, F]    of down
    <experts>.lora_B.weight                     [D, R * E]

Files of older versions have separate ones for each expert: ``<experts>.3.gate_proj.lora_A.weight`` ``[R, D]``.

Legend: E experts, R rank, D hidden size, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_moefold.layout import Box

PREFIX = "base_model.model."
#: Maps a parameter of :class:`~.experts.Experts` to its name in a fused file, below the experts' name.
FUSED = {
    "gate_up_lora_A": "base_layer.lora_A.weight",
    "gate_lora_B": "base_layer.lora_B.weight",
    "up_lora_B": "base_layer.lora_B.weight",
    "down_lora_A": "lora_A.weight",
    "down_lora_B": "lora_B.weight",
}
#: Names of an expert's matrices in Mixtral's files.
MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def matrix_names(mixtral: bool) -> dict[str, str]:
    """Returns the names of an expert's matrices in files with an adapter for each of them."""
    return dict(MIXTRAL) if mixtral else {name: name for name in MIXTRAL}


Read = Callable[[str, tuple[slice, ...]], Tensor]


def read_fused(read: Read, experts: str, leaf: str, shape: tuple[int, ...], box: Box) -> Tensor:
    """Reads the part ``box`` of an expert parameter of ``shape`` from a fused file.

    Args:
        read: Reads part of a tensor of the file.
        experts: Name of the experts in the file.
        leaf: A key of :data:`FUSED`.
        shape: Global shape of the parameter.
        box: The part to read.
    """
    of_experts, *rest = box.slices()
    name = f"{experts}.{FUSED[leaf]}"
    if leaf.endswith("lora_A"):
        rank = shape[1]
        rows = slice(of_experts.start * rank, of_experts.stop * rank)
        return read(name, (rows, rest[1])).unflatten(0, (-1, rank))[:, rest[0]]
    first = shape[1] if leaf == "up_lora_B" else 0
    rows = slice(first + rest[0].start, first + rest[0].stop)
    whole = read(name, (rows, slice(0, shape[0] * shape[2])))
    return whole.unflatten(1, (shape[2], shape[0])).permute(2, 0, 1)[of_experts, :, rest[1]]


def read_separate(read: Read, expert: str, leaf: str, shape: tuple[int, ...], names: dict[str, str]) -> Tensor:
    """Reads a parameter of one expert from a file with a separate adapter for each matrix.

    The separate A's of gate and up become one A of twice the rank, and each B has zeros for the other's half.

    Args:
        read: Reads part of a tensor of the file.
        expert: Name of the expert in the file.
        leaf: A key of :data:`FUSED`.
        shape: Shape of the parameter of one expert.
        names: Names of the expert's matrices in the file.
    """

    def whole(matrix: str, part: str) -> Tensor:
        return read(f"{expert}.{names[matrix]}.{part}.weight", ())

    matrix, _, part = leaf.partition("_lora_")
    part = f"lora_{part}"
    if matrix == "gate_up":
        return torch.cat([whole("gate_proj", part), whole("up_proj", part)])
    own = whole(f"{matrix}_proj", part)
    if matrix == "down":
        return own
    zeros = torch.zeros_like(own)
    assert shape[1] == 2 * own.shape[1]
    return torch.cat([own, zeros] if matrix == "gate" else [zeros, own], dim=1)


def stored_leaf(leaf: str) -> str:
    """Returns the end of the name in the file for ``lora_A``, ``lora_B`` or ``lora_magnitude``."""
    return "lora_magnitude_vector" if leaf == "lora_magnitude" else f"{leaf}.weight"


def fuse(experts: str, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Converts the expert parameters of one layer to the form of a fused file.

    Args:
        experts: Name of the experts in the file.
        parts: The whole parameters by the keys of :data:`FUSED`.
    """
    b = torch.cat([parts["gate_lora_B"], parts["up_lora_B"]], dim=1)
    return {
        f"{experts}.base_layer.lora_A.weight": parts["gate_up_lora_A"].flatten(0, 1),
        f"{experts}.base_layer.lora_B.weight": b.permute(1, 2, 0).flatten(1).contiguous(),
        f"{experts}.lora_A.weight": parts["down_lora_A"].flatten(0, 1),
        f"{experts}.lora_B.weight": parts["down_lora_B"].permute(1, 2, 0).flatten(1).contiguous(),
    }


def separate(experts: str, parts: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """Expert parameters of one layer, as a file with an adapter for each matrix of an expert holds them.

    Gate and up have the same A.

    Args:
        experts: Name of the experts in the file.
        parts: The whole parameters by the keys of :data:`FUSED`.
        names: Names of the expert's matrices in the file.
    """
    stored = {}
    for matrix, leaf in (("gate_proj", "gate_up"), ("up_proj", "gate_up"), ("down_proj", "down")):
        pairs = zip(parts[f"{leaf}_lora_A"], parts[f"{matrix.removesuffix('_proj')}_lora_B"], strict=True)
        for expert, (a, b) in enumerate(pairs):
            stored[f"{experts}.{expert}.{names[matrix]}.lora_A.weight"] = a.clone()
            stored[f"{experts}.{expert}.{names[matrix]}.lora_B.weight"] = b.clone()
    return stored

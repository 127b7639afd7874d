# SPDX-License-Identifier: Apache-2.0
"""CAMERA-P: writes a checkpoint without the micro-experts that have the least energy.

``zeroed`` keeps all shapes and sets what is pruned to zero, channels being compared over a whole layer. ``uniform`` makes every
expert of the model equally narrow, each keeping its own best channels, so that the result is an ordinary smaller checkpoint.
``packed`` takes out of the files what ``zeroed`` sets to zero; experts then have widths of their own, which this package alone
trains and :func:`unpack` makes a zeroed checkpoint of.

Legend: E experts, F expert width, S width of the shared expert, D hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lightning_moefold.checkpoint import HFCheckpoint
from lightning_moefold.checkpoint.hub import local_directory
from lightning_moefold.compression.energies import Energies
from lightning_moefold.compression.ranking import Kept, check_ratio, keep_by_expert, keep_by_layer, uniform_width
from lightning_moefold.compression.rewrite import read_plain_config, rewrite
from lightning_moefold.errors import InputError
from lightning_moefold.models import MoEConfig
from lightning_moefold.models.names import parameter_entries

Form = Literal["zeroed", "uniform", "packed"]
FORMS = ("zeroed", "uniform", "packed")

_PART = re.compile(r"model\.layers\.(\d+)\.mlp\.(?:experts|shared_expert)\.(gate|up|down)_proj(\.weight)?")


@dataclass(frozen=True)
class Pruned:
    """What pruning has taken away.

    Args:
        kept: Channels that stay, by layer.
        lost: Share of each layer's energy that is gone, by layer.
        parameters: Numbers of parameters that are not pruned away, before and after.
        flops: Forward FLOPs of experts for a calibration token, summed over layers, before and after: 6 D for each channel of
            each expert that the token chose, and of shared experts.
        form: What was written. A zeroed checkpoint still holds and computes what is pruned.
    """

    kept: Mapping[int, Kept]
    lost: Mapping[int, float]
    parameters: tuple[int, int]
    flops: tuple[float, float]
    form: Form


def prune(
    checkpoint: str | Path,
    energies: Energies,
    output: str | Path,
    ratio: float,
    form: Form = "zeroed",
    multiple: int = 1,
) -> Pruned:
    """Writes the pruned checkpoint.

    Args:
        checkpoint: Directory that was analysed.
        energies: Result of :func:`~.analysis.analyze`.
        output: Directory to make; one that holds a model is replaced, one with other files in it is refused.
        ratio: Share of channels that is pruned.
        form: See above.
        multiple: For ``uniform``, a number that divides the widths that are kept.

    Raises:
        InputError: If ratio, form or multiple cannot be, or the energies are those of another checkpoint or ratio.
    """
    path = local_directory(checkpoint)
    config = read_plain_config(path)
    kept = choose(path, config, energies, ratio, form, multiple)
    smaller = config
    if form == "uniform":
        first = next(iter(kept.values()))
        smaller = replace(
            config,
            moe_intermediate_size=int(first.widths_E[0]),
            shared_expert_intermediate_size=int(first.shared_S.sum()),
        )
    elif form == "packed":
        numbers = range(config.num_hidden_layers)
        smaller = replace(
            config,
            packed_widths=tuple(tuple(kept[i].widths_E.tolist()) if i in kept else () for i in numbers),
            packed_shared_widths=tuple(int(kept[i].shared_S.sum()) if i in kept else 0 for i in numbers),
        )
    rewrite(path, output, smaller, lambda name, value: _change(name, value, kept, form))
    gone = sum(3 * config.hidden_size * int((~mask).sum()) for layer in kept.values() for mask in layer)
    total = config.num_parameters()
    whole = {layer: Kept(np.ones_like(k.routed_EF), np.ones_like(k.shared_S)) for layer, k in kept.items()}
    flops = tuple(6 * config.hidden_size * _channels_of_a_token(energies, k) for k in (whole, kept))
    lost = {layer: lost_energy(energies, row, kept[layer]) for row, layer in enumerate(energies.layers.tolist())}
    return Pruned(kept, lost, (total, total - gone), (flops[0], flops[1]), form)


def _channels_of_a_token(energies: Energies, kept: Mapping[int, Kept]) -> float:
    """Returns how many channels a calibration token uses, over all layers."""
    total = 0.0
    for row, layer in enumerate(energies.layers.tolist()):
        total += float((energies.load[row] * kept[layer].widths_E).sum() / energies.tokens + kept[layer].shared_S.sum())
    return total


def check_energies(path: Path, energies: Energies) -> None:
    """Raises InputError unless the energies are those of a checkpoint."""
    if energies.checkpoint != HFCheckpoint(path).fingerprint():
        raise InputError(f"the energies are not those of {path}; analyse this checkpoint, or use the one that was.")


def choose(
    path: Path, config: MoEConfig, energies: Energies, ratio: float, form: Form, multiple: int = 1
) -> dict[int, Kept]:
    """Returns the channels that stay, by layer, after checking that ratio, form and energies suit the checkpoint.

    Raises:
        InputError: If they do not.
    """
    check_ratio(ratio)
    if form not in FORMS:
        raise InputError(f"--form {form} is not known; use {', '.join(FORMS)}.")
    if multiple != 1 and form != "uniform":
        raise InputError(f"--multiple {multiple} goes with --form uniform only, as {form} keeps uneven widths.")
    if not np.isnan(energies.ratio) and energies.ratio != ratio:
        raise InputError(
            f"the file of energies was analysed with layers pruned at --ratio {energies.ratio}, so it cannot prune at {ratio}; "
            "analyse again with this ratio, or without one for energies that any ratio may use."
        )
    check_energies(path, energies)
    layers = list(zip(energies.layers.tolist(), energies.energy, energies.shared_energy, strict=True))
    if form != "uniform":
        return {layer: keep_by_layer(energy_EF, shared_S, ratio) for layer, energy_EF, shared_S in layers}
    width, shared = uniform_width(config.moe_intermediate_size, ratio, multiple), energies.shared_energy.shape[1]
    shared = shared and uniform_width(shared, ratio, multiple, "shared expert's width")
    return {layer: keep_by_expert(energy_EF, shared_S, width, shared) for layer, energy_EF, shared_S in layers}


def unpack(checkpoint: str | Path, output: str | Path) -> None:
    """Writes a packed checkpoint with the shapes of the model that was pruned, its missing channels zero.

    The channels of an expert that it has are first; their order changes nothing.

    Args:
        checkpoint: Packed directory.
        output: Directory to make; one that holds a model is replaced, one with other files in it is refused.

    Raises:
        InputError: If the checkpoint is not packed.
    """
    path = local_directory(checkpoint)
    config = MoEConfig.from_pretrained(path, output_router_logits=False)
    if not config.is_packed:
        raise InputError(f"{path} is not packed, so there is nothing to unpack.")
    plain = replace(config, packed_widths=(), packed_shared_widths=())
    shapes = {name: entry.shape for name, entry in parameter_entries(plain).items()}

    def change(name: str, value: Tensor) -> Tensor:
        part = micro_expert_part(name)
        if part is None:
            return value
        layer, shared, dim = part
        whole = value.new_zeros(shapes[name])
        if shared:
            whole.narrow(dim, 0, value.shape[dim]).copy_(value)
            return whole
        for expert, rows_FD in zip(whole, value.split(config.packed_widths[layer]), strict=True):
            expert.narrow(dim - 1, 0, len(rows_FD)).copy_(rows_FD.t() if dim == 2 else rows_FD)
        return whole

    rewrite(path, output, plain, change)


def lost_energy(energies: Energies, row: int, kept: Kept) -> float:
    """Returns the share of a layer's energy that its pruned channels had."""
    routed_EF, shared_S = energies.energy[row], energies.shared_energy[row]
    gone = routed_EF[~kept.routed_EF].sum() + shared_S[~kept.shared_S].sum()
    total = routed_EF.sum() + shared_S.sum()
    return float(gone / total) if total else 0.0


def micro_expert_part(name: str) -> tuple[int, bool, int] | None:
    """Returns layer, whether it is of the shared expert, and the dimension of channels, of a parameter that has channels.

    Routed experts are stacks ``[E, F, D]`` and ``[E, D, F]``.
    """
    if (match := _PART.fullmatch(name)) is None:
        return None
    layer, which, weight = match.groups()
    shared, down = weight is not None, which == "down"
    return int(layer), shared, 1 if down == shared else 2 if down else 0


def _change(name: str, value: Tensor, kept: Mapping[int, Kept], form: Form) -> Tensor:
    part = micro_expert_part(name)
    if part is None or part[0] not in kept:
        return value
    layer, shared, dim = part
    if shared:
        mask_S = torch.from_numpy(kept[layer].shared_S)
        if form != "zeroed":
            return value.index_select(dim, mask_S.nonzero().squeeze(1))
        return value * (mask_S if dim == 1 else mask_S.unsqueeze(1))
    mask_EF = kept[layer].routed_EF
    if form != "zeroed":
        narrow = [
            expert.index_select(dim - 1, torch.from_numpy(np.flatnonzero(channels)))
            for expert, channels in zip(value, mask_EF, strict=True)
        ]
        if form == "uniform":
            return torch.stack(narrow)
        return torch.cat([part.t() for part in narrow] if dim == 2 else narrow)
    return value * torch.from_numpy(mask_EF).unsqueeze(3 - dim)

# SPDX-License-Identifier: Apache-2.0
"""CAMERA-Q: fewer bits for the micro-experts with less energy.

The channels of a layer, the shared expert's in the same list, are put into groups by energy, and the three vectors of a
micro-expert have the bits of its group. Weights are *fake-quantised*: rounded to the nearest number that the bits can hold and
written in the checkpoint's dtype, so the file does not get smaller, and the error is that of round-to-nearest, without GPTQ.
No library that we know stores different bits for the channels of one matrix.

A vector of D numbers is cut into blocks that have a scale and a zero of 16 bits each::

    w = scale * q + low,  q = round((w - low) / scale) in 0 .. 2^bits - 1          one bit: w = +-mean |w|

Legend: E experts, F expert width, D hidden size, V vectors, B numbers of a block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_moefold.checkpoint.hub import local_directory
from lightning_moefold.compression.energies import Energies
from lightning_moefold.compression.pruning import check_energies, micro_expert_part
from lightning_moefold.compression.rewrite import read_plain_config, rewrite
from lightning_moefold.errors import InputError


@dataclass(frozen=True)
class Bits:
    """Bits of the groups.

    Args:
        bits: Of each group, those with the most energy first.
        shares: Share of the channels in each group; they sum to 1.
        block: Numbers that share a scale and a zero.

    Raises:
        InputError: If the numbers cannot be.
    """

    bits: tuple[int, ...] = (3, 2, 1)
    shares: tuple[float, ...] = (0.25, 0.5, 0.25)
    block: int = 128

    def __post_init__(self) -> None:
        if len(self.bits) != len(self.shares) or not self.bits:
            raise InputError(
                f"--bits names {len(self.bits)} groups and --shares {len(self.shares)}; give one share each."
            )
        if any(not 1 <= bits <= 8 for bits in self.bits):
            raise InputError(f"--bits {','.join(map(str, self.bits))} must lie from 1 to 8.")
        if any(not 0 <= share <= 1 for share in self.shares) or not math.isclose(sum(self.shares), 1, abs_tol=1e-9):
            raise InputError(f"--shares {','.join(map(str, self.shares))} must be from 0 to 1 and sum to 1.")
        if self.block < 1:
            raise InputError(f"--block {self.block} must be at least 1.")

    @property
    def mean(self) -> float:
        """Mean number of bits of a weight, without scales and zeros."""
        return sum(bits * share for bits, share in zip(self.bits, self.shares, strict=True))

    @property
    def stored(self) -> float:
        """The same with a scale and a zero of 16 bits for each full block."""
        return self.mean + 32 / self.block

    def of(self, energy_N: NDArray[np.float64]) -> NDArray[np.int64]:
        """Returns the bits of each channel of a layer; of equal energies the first has fewer."""
        ends = np.round(np.cumsum(self.shares[::-1]) * len(energy_N)).astype(np.int64)
        rank_N = np.empty(len(energy_N), np.int64)
        rank_N[np.argsort(energy_N, kind="stable")] = np.arange(len(energy_N))
        return np.asarray(self.bits[::-1])[np.searchsorted(ends[:-1], rank_N, side="right")]


def quantize(
    checkpoint: str | Path, energies: Energies, output: str | Path, how: Bits = Bits()
) -> dict[int, tuple[float, float]]:
    """Writes the checkpoint with fake-quantised experts.

    Args:
        checkpoint: Directory that was analysed.
        energies: Of the dense model (:func:`~.analysis.analyze` without a ratio).
        output: Directory to make; one that holds a model is replaced, one with other files in it is refused.
        how: Bits of the groups.

    Returns:
        For each layer the relative error of its experts' weights, ``|w - q| / |w|``, and the same with each channel weighed by
        its energy.

    Raises:
        InputError: If the energies are those of another checkpoint, or of a pruned model.
    """
    path = local_directory(checkpoint)
    config = read_plain_config(path)
    check_energies(path, energies)
    if not np.isnan(energies.ratio):
        raise InputError(
            f"the energies are those of a model pruned at --ratio {energies.ratio}; analyse it without a ratio to quantise it."
        )
    e, f = config.num_experts, config.moe_intermediate_size
    bits: dict[int, NDArray[np.int64]] = {}
    weigh: dict[int, NDArray[np.float64]] = {}
    for row, layer in enumerate(energies.layers.tolist()):
        weigh[layer] = np.concatenate([energies.energy[row].ravel(), energies.shared_energy[row]])
        bits[layer] = how.of(weigh[layer])
    errors = {layer: np.zeros((2, 2)) for layer in bits}

    def change(name: str, value: Tensor) -> Tensor:
        """Rounds a parameter of micro-experts to the bits of its channels, and notes the error; others stay as they are."""
        part = micro_expert_part(name)
        if part is None or part[0] not in bits:
            return value
        layer, shared, dim = part
        mine = slice(e * f, None) if shared else slice(0, e * f)
        is_down = dim == value.dim() - 1
        rows = value.mT if is_down else value  # a row for each channel
        vectors_VD = rows.reshape(-1, config.hidden_size)
        rounded_VD = rounded(vectors_VD, torch.from_numpy(bits[layer][mine]), how.block)
        _note(errors[layer], vectors_VD, rounded_VD, torch.from_numpy(weigh[layer][mine]))
        found = rounded_VD.view(rows.shape)
        return found.mT.contiguous() if is_down else found

    rewrite(path, output, config, change)
    return {layer: (_ratio(*plain), _ratio(*weighed)) for layer, (plain, weighed) in errors.items()}


def rounded(vectors_VD: Tensor, bits_V: Tensor, block: int) -> Tensor:
    """Rounds vectors to what their bits can hold, in float32 or wider; returns them in their dtype."""
    wide_VD = vectors_VD.to(torch.promote_types(vectors_VD.dtype, torch.float32))
    blocks = []
    for part_VB in wide_VD.split(block, dim=1):
        low_V1, high_V1 = part_VB.amin(1, keepdim=True), part_VB.amax(1, keepdim=True)
        steps_V1 = (2.0 ** bits_V.to(part_VB.dtype) - 1).unsqueeze(1)
        scale_V1 = ((high_V1 - low_V1) / steps_V1).clamp(min=torch.finfo(part_VB.dtype).tiny)
        several_VB = ((part_VB - low_V1) / scale_V1).round().clamp(min=0).minimum(steps_V1) * scale_V1 + low_V1
        one_VB = part_VB.abs().mean(1, keepdim=True) * torch.where(part_VB < 0, -1.0, 1.0)
        blocks.append(torch.where((bits_V == 1).unsqueeze(1), one_VB, several_VB))
    return torch.cat(blocks, dim=1).to(vectors_VD.dtype)


def _note(sums: NDArray[np.float64], before_VD: Tensor, after_VD: Tensor, energy_V: Tensor) -> None:
    """Adds the squares of the error and of the weights, plain and weighed by energy."""
    error_V = (before_VD.double() - after_VD.double()).square().sum(1)
    size_V = before_VD.double().square().sum(1)
    sums += [[(w * x).sum().item() for x in (error_V, size_V)] for w in (1, energy_V)]


def _ratio(error: float, size: float) -> float:
    return float(np.sqrt(error / size)) if size else 0.0

# SPDX-License-Identifier: Apache-2.0
"""Random numbers that depend only on their coordinates, not on the rank that draws them or on earlier draws.

Each number is a hash of its coordinates (seed, call, layer, row, position, component), so a rank can compute those of
its own tokens. The hash is the finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).

Legend: T tokens of this rank, D components.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_MULTIPLIERS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))
_STEP = 0x9E3779B97F4A7C15 - (1 << 64)


def generator_of(seed: int, name: object) -> torch.Generator:
    """Returns torch's generator for what has a name, whatever was drawn before; on CPU."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def hashed(*coordinates: Tensor | int) -> Tensor:
    """Hashes integer coordinates to int64; tensors among them are broadcast."""
    value = torch.zeros((), dtype=torch.int64)
    for coordinate in coordinates:
        if isinstance(coordinate, Tensor):
            value = value.to(coordinate.device)
        value = _mix(value + _STEP + coordinate)
    return value


def uniform(key_T: Tensor, size: int, dtype: torch.dtype, first: int = 0) -> Tensor:
    """Returns ``[T, D]`` numbers in [0, 1), multiples of 2^-24, from one hash per token.

    Args:
        key_T: The hashes.
        size: Number of components, D.
        dtype: Of the numbers.
        first: Number of the first component.
    """
    component_D = torch.arange(first + 1, first + size + 1, device=key_T.device) * _STEP
    bits_TD = _shift(_mix(key_T.unsqueeze(-1) + component_D), 40)
    return bits_TD.to(dtype) * 2.0**-24


def _mix(x: Tensor) -> Tensor:
    """Applies the finalizer of SplitMix64; integer products wrap around, as the hash requires."""
    x = (x ^ _shift(x, 30)) * _MULTIPLIERS[0]
    x = (x ^ _shift(x, 27)) * _MULTIPLIERS[1]
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shifts to the right and fills with zeros (``>>`` would repeat the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)

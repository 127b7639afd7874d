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

#: Bits of a shift and the multiplier that follows it.
ROUNDS = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)))
_ALL_BITS = (1 << 64) - 1
STEP = 0x9E3779B97F4A7C15 - (1 << 64)


def generator_of(seed: int, name: object) -> torch.Generator:
    """Returns torch's generator for what has a name, whatever was drawn before; on CPU."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def hashed(*coordinates: Tensor | int) -> Tensor:
    """Hashes integer coordinates to int64; tensors among them are broadcast.

    Integers before the first tensor are hashed in Python: a tensor of them would be copied to the device, and the host would wait.
    """
    value: Tensor | int = 0
    for coordinate in coordinates:
        if isinstance(value, int):
            value = _signed(value + STEP)
            value = _mix_number(value + coordinate) if isinstance(coordinate, int) else _mix_(coordinate + value)
        else:
            value = _mix_(value + STEP + coordinate)
    return value if isinstance(value, Tensor) else torch.tensor(value)


def uniform(key_T: Tensor, size: int, dtype: torch.dtype, first: int = 0) -> Tensor:
    """Returns ``[T, D]`` numbers in [0, 1), multiples of 2^-24, from one hash per token.

    Args:
        key_T: The hashes.
        size: Number of components, D.
        dtype: Of the numbers.
        first: Number of the first component.
    """
    component_D = torch.arange(first + 1, first + size + 1, device=key_T.device) * STEP
    # The last step of the finalizer is left out: it changes only bits below the first 31, and the first 24 are used.
    bits_TD = _shift(_multiply_(key_T.unsqueeze(-1) + component_D), 40)
    return bits_TD.to(dtype).mul_(2.0**-24)


def _mix_(x: Tensor) -> Tensor:
    """Applies the finalizer of SplitMix64 in place; integer products wrap around, as the hash requires."""
    return x.bitwise_xor_(_shift(_multiply_(x), 31))


def _multiply_(x: Tensor) -> Tensor:
    """Applies the finalizer in place, but for its last step."""
    for bits, multiplier in ROUNDS:
        x.bitwise_xor_(_shift(x, bits)).mul_(multiplier)
    return x


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shifts to the right and fills with zeros (``>>`` would repeat the sign)."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix_number(x: int) -> int:
    """Applies the finalizer to a number of the host."""
    x &= _ALL_BITS
    for bits, multiplier in ROUNDS:
        x = (x ^ x >> bits) * multiplier & _ALL_BITS
    return _signed(x ^ x >> 31)


def _signed(x: int) -> int:
    """Wraps around as int64 does."""
    return (x + (1 << 63) & _ALL_BITS) - (1 << 63)

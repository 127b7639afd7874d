# SPDX-License-Identifier: Apache-2.0
"""The ways to store frozen weights in fewer bytes, and how many. Pure Python; :mod:`.quantized` computes with them."""

from __future__ import annotations

from typing import Literal

#: Numbers that share a scale.
BLOCK = 64

Quantization = Literal["nf4", "int8"]
QUANTIZATIONS: tuple[Quantization, ...] = ("nf4", "int8")

#: Bits of a number of each kind, its share of the scale included.
BITS = {"nf4": 4 + 32 / BLOCK, "int8": 8 + 32 / BLOCK}

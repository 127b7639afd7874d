# SPDX-License-Identifier: Apache-2.0
"""Whether a fold cuts weights that are stored as bytes between their blocks. Pure Python."""

from __future__ import annotations

from lightning_moefold.errors import FoldError
from lightning_moefold.fold import Fold
from lightning_moefold.models.config import MoEConfig
from lightning_moefold.modules.quantization import BLOCK


def check_blocks(config: MoEConfig, fold: Fold) -> None:
    """Checks that a fold cuts weights which are stored as bytes between blocks of numbers.

    Raises:
        FoldError: Naming a width that is no multiple of a block on each rank.
    """
    heads, size = config.num_attention_heads, config.head_dim
    inputs = {("tp", "hidden_size"): (config.hidden_size, 1)}
    inputs["tp", "num_attention_heads * head_dim"] = heads * size, fold.tp if heads % fold.tp == 0 else 1
    inputs |= {("tp", field): (width, fold.tp) for field, width in config.dense_widths.items()}
    inputs |= {("etp", field): (width, fold.etp) for field, width in config.expert_widths.items()}
    for (axis, field), (width, ranks) in inputs.items():
        if width % (ranks * BLOCK):
            legal = [n for n in range(1, max(width // BLOCK, 1) + 1) if width % (n * BLOCK) == 0]
            way = f"use {axis} in {legal}" if legal else "leave quantize out"
            among = f" over {axis}={ranks}" if ranks > 1 else ""
            raise FoldError(
                f"{field}={width}{among} is no multiple of the {BLOCK} numbers that quantize rounds together; {way}."
            )

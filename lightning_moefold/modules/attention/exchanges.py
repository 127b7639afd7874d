# SPDX-License-Identifier: Apache-2.0
"""Which exchange brings queries and keys of a cut row together, by sizes alone. Pure Python: the planner asks, too."""

from __future__ import annotations

from typing import Literal

Exchange = Literal["auto", "ring", "all_gather", "all_to_all"]
EXCHANGES = ("auto", "ring", "all_gather", "all_to_all")
#: Below this, gathered keys and values of a row are not worth a ring's many messages.
SMALL_BYTES = 32 * 1024 * 1024


def padded_length(length: int, cp: int) -> int:
    """The positions to which a row of ``length`` is padded, so that it can be cut into ``2 * cp`` equal chunks."""
    return length if cp == 1 else -(-length // (2 * cp)) * 2 * cp


def exchange_for(cp: int, heads: int, kv_heads: int, row_bytes: int) -> Exchange:
    """Which exchange ``"auto"`` takes.

    All-to-all moves ``2 H + 2 V`` heads' worth of a rank's positions once, less what stays; the others ``2 V`` heads'
    worth ``cp - 1`` times. So all-to-all where the heads divide by cp and ``(H + V) / cp < V``; else one all-gather where
    keys and values of the whole row are small (32 MB), else a ring, which never holds those of a whole row.

    Args:
        cp: Ranks over which rows are cut.
        heads: H of a tp rank.
        kv_heads: V of a tp rank.
        row_bytes: Of the keys and values of whole rows.
    """
    if heads % cp == 0 and kv_heads % cp == 0 and heads + kv_heads < cp * kv_heads:
        return "all_to_all"
    return "all_gather" if row_bytes <= SMALL_BYTES else "ring"

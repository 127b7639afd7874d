# SPDX-License-Identifier: Apache-2.0
"""Chooses the context parallel exchange by sizes only. Pure Python, because the planner uses it too."""

from __future__ import annotations

from typing import Literal

Exchange = Literal["auto", "ring", "all_gather", "all_to_all"]
EXCHANGES = ("auto", "ring", "all_gather", "all_to_all")
#: Up to this size of gathered keys and values, one all-gather is better than a ring's many messages.
SMALL_BYTES = 32 * 1024 * 1024
#: Bytes of a rank's keys and values in one message: large enough for a link's bandwidth, and small compared with what attention
#: keeps of a long row.
MESSAGE_BYTES = 4 * 1024 * 1024


def padded_length(length: int, cp: int) -> int:
    """Returns the length to which a row is padded, so that it can be cut into ``2 * cp`` equal chunks."""
    return length if cp == 1 else -(-length // (2 * cp)) * 2 * cp


def exchange_for(cp: int, heads: int, kv_heads: int, row_bytes: int) -> Exchange:
    """Returns the exchange that ``"auto"`` chooses.

    All-to-all moves a rank's positions of ``2 H + 2 V`` heads once, less what stays on the rank; the others move those
    of ``2 V`` heads ``cp - 1`` times. So it is all-to-all if cp divides the heads and ``(H + V) / cp < V``. Otherwise
    it is an all-gather if keys and values of the whole rows are small (32 MB), or else a ring, which never holds those
    of a whole row.

    Args:
        cp: Number of ranks over which rows are cut.
        heads: Number of query heads H of a tp rank.
        kv_heads: Number of key/value heads V of a tp rank.
        row_bytes: Bytes of the keys and values of whole rows.
    """
    if heads % cp == 0 and kv_heads % cp == 0 and heads + kv_heads < cp * kv_heads:
        return "all_to_all"
    return "all_gather" if row_bytes <= SMALL_BYTES else "ring"


def heads_of_message(kv_heads: int, head_bytes: int) -> int:
    """Returns how many key/value heads travel together: as many as fit into ``MESSAGE_BYTES``, but at least one.

    Args:
        kv_heads: Number of key/value heads of a tp rank.
        head_bytes: Bytes of the keys and values of one head at a cp rank's positions.
    """
    return max(1, min(kv_heads, MESSAGE_BYTES // max(head_bytes, 1)))


def has_kernel_for_runs(head_size: int, bytes_of_number: int) -> bool:
    """Returns whether CUDA's kernel for runs (:mod:`.varlen`) takes such heads: 16-bit, of at most 256 numbers, 8 at a time."""
    return bytes_of_number == 2 and head_size % 8 == 0 and head_size <= 256

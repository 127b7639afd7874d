# SPDX-License-Identifier: Apache-2.0
"""How many rows of logits a cross-entropy holds at once. Pure Python: the planner asks, too."""

from __future__ import annotations

from lightning_moefold.layout import chunk_split

#: Logits made at a time: large enough for an efficient product, small enough to stay far below the whole. Each chunk
#: reads and writes the whole weight gradient, which a GPU feels more.
CHUNK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 29}
#: Chunks are multiples of this many rows where that many fit: products of odd heights are slower (131 rows took 1.12 times
#: what 256 take, vocabulary 32,000 on CPU).
_WHOLE_ROWS = 64


def chunk_rows(vocab_size: int, tp: int, device_type: str) -> int:
    """Rows of logits made at a time; the same on all tp ranks, whose parts of the vocabulary may differ by one."""
    widest = chunk_split(vocab_size, tp)[0]
    rows = max(1, CHUNK_ELEMENTS.get(device_type, CHUNK_ELEMENTS["cpu"]) // widest)
    return rows if rows < _WHOLE_ROWS else rows // _WHOLE_ROWS * _WHOLE_ROWS

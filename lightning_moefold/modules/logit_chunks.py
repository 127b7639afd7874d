# SPDX-License-Identifier: Apache-2.0
"""The number of rows of logits that a cross-entropy holds at once. Pure Python, because the planner uses it too."""

from __future__ import annotations

from lightning_moefold.layout import chunk_split

#: Number of logits per chunk: large enough for an efficient product, and small compared with all logits. Each chunk
#: reads and writes the whole weight gradient, which costs relatively more on a GPU.
CHUNK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 29}
#: Chunks are multiples of this many rows if that many fit, because products with an odd number of rows are slower (131
#: rows took 1.12 times the time of 256, with a vocabulary of 32,000 on CPU).
_WHOLE_ROWS = 64


def chunk_rows(vocab_size: int, tp: int, device_type: str) -> int:
    """Returns the rows of logits per chunk; equal on all tp ranks, although their parts of the vocabulary may differ by one."""
    widest = chunk_split(vocab_size, tp)[0]
    rows = max(1, CHUNK_ELEMENTS.get(device_type, CHUNK_ELEMENTS["cpu"]) // widest)
    return rows if rows < _WHOLE_ROWS else rows // _WHOLE_ROWS * _WHOLE_ROWS

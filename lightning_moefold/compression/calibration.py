# SPDX-License-Identifier: Apache-2.0
"""Text as calibration rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from lightning_moefold.compression.stream import CalibrationRows
from lightning_moefold.errors import InputError
from lightning_moefold.recipes.data import TextData
from lightning_moefold.recipes.packing import PADDING


def read_calibration(
    files: Sequence[str | Path],
    tokenizer: str | Path,
    rows: int = 128,
    length: int = 2048,
    seed: int = 0,
    cache_dir: str | Path = ".moefold_tokens",
) -> CalibrationRows:
    """Draws rows of a text, or of conversations, as training reads them (:class:`~.recipes.TextData`).

    Args:
        files: Texts or conversations.
        tokenizer: Directory with the model's tokenizer.
        rows: Number of rows; all of them if there are fewer.
        length: Tokens of a row.
        seed: Of the draw.
        cache_dir: Where tokens are kept.

    Raises:
        InputError: If the text is shorter than a row, or a file cannot be read.
    """
    if rows < 1:
        raise InputError(f"--rows {rows} must be at least 1.")
    if seed < 0:
        raise InputError(f"--seed {seed} must be 0 or more.")
    data = TextData(list(map(str, files)), str(tokenizer), length, 1, val_fraction=0.0, cache_dir=str(cache_dir))
    data.prepare_data()
    data.setup("fit")
    part = data.part("train")
    drawn = np.sort(np.random.default_rng(seed).permutation(len(part))[:rows])
    taken = part.take(torch.from_numpy(drawn))
    packed = part.packing == "documents"
    real_NS = taken.document_BL != PADDING
    mask_NS = None if bool(real_NS.all()) else real_NS.long()
    return CalibrationRows(taken.token_BL, mask_NS, taken.document_BL.long() if packed else None)

# SPDX-License-Identifier: Apache-2.0
"""Rows of documents and of files, without a data module."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lightning_moefold.recipes.packing import Packing, Rows, plan_rows
from lightning_moefold.recipes.store import StoreWriter, TokenStore, write_sums
from lightning_moefold.recipes.template import Document, Kind
from lightning_moefold.recipes.tokenizing import Reading, tokenize


def rows_of(documents: Sequence[Document], packing: Packing, length: int) -> Rows:
    """Documents packed, each a row of one file."""
    folder = Path(tempfile.mkdtemp())
    writer = StoreWriter(folder)
    for number, document in enumerate(documents):
        writer.add([document], 0, number + 1, document.kind != Kind.TEXT)
    writer.close()
    write_sums(folder)
    store = TokenStore.open(folder, [Path("a.jsonl")])
    return Rows(store, plan_rows(store, packing, length))


def tokenized(files: Sequence[Path], tokenizer: Path, length: int, packing: Packing, **reading: Any) -> Rows:
    """Files tokenised in this process and packed."""
    folder = Path(tempfile.mkdtemp())
    tokenize(files, Reading(str(tokenizer), **reading), folder, processes=1)
    write_sums(folder)
    store = TokenStore.open(folder, files)
    return Rows(store, plan_rows(store, packing, length))


def tokens(rows: Rows) -> Tensor:
    """All rows, ``[N, L]``."""
    return rows.take(np.arange(len(rows)).tolist()).token_BL

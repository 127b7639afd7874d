# SPDX-License-Identifier: Apache-2.0
"""Every fold trains the adapter that PEFT trains on Hugging Face's model in one process (float64, errors below 1e-9)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_moefold import Fold
from lightning_moefold.testing import RankPool
from tests.adapters.made import make_adapter
from tests.exactness import compare, matrix
from tests.exactness.shapes import SHAPES, checkpoint
from tests.quick import quick

ROW: dict[str, Any] = {
    "family": "qwen2_moe", "shape": "12 experts", "accumulate": 1, "auxiliary": True, "microbatches": 1,
    "uneven rows": False, "padding": "none", "documents": False, "ignore": "uneven", "frozen": "none",
    "sharding": "optimizer", "optimizer": "adamw", "recompute": None, "dispatch": "alltoall", "exchange": None,
    "schedule": "1f1b",
}  # fmt: skip

CASES = [
    ("tp2 | etp2", {"sharding": "none"}),
    ("tp2 | ep2", {"shape": "6 experts, tied", "recompute": "full"}),  # one key/value head: replicated over tp
    ("tp2 | etp2 ep2", {"dispatch": "chunks", "padding": "left"}),
    ("cp2 | etp2 ep2", {"family": "mixtral", "recompute": "selective", "sharding": "full"}),
    (" | ep2", {"family": "qwen3_moe", "shape": "dense layers", "sharding": "full", "accumulate": 2}),
    (" | etp2", {"family": "qwen3_moe", "optimizer": "sgd", "dispatch": "allgather"}),
    ("pp2 | ep2", {"microbatches": 2, "sharding": "none"}),
    ("pp2 tp2 | etp2", {"microbatches": 2, "schedule": "zbv", "family": "qwen3_moe"}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.mark.parametrize(("fold", "factors"), quick(CASES, CASES[2], CASES[7]), ids=[fold for fold, _ in CASES])
def test_folds(pool: RankPool, folder: Path, fold: str, factors: dict[str, Any]) -> None:
    row, parsed = {**ROW, **factors}, Fold.parse(fold, 2 if fold == "tp2 | etp2" else 4)
    base = checkpoint(folder, row["family"], row["shape"], matrix.layers(parsed, row))
    adapter = folder / f"{base.name}-adapter"
    if not adapter.exists():
        make_adapter(adapter, base)
    number = row["accumulate"] * (compare.STEPS - (row["accumulate"] > 1))
    batches = compare.draw_batches(parsed, row, number, SHAPES[row["shape"]].get("vocab_size", 96), length=5)
    compare.check_run(pool, base, parsed, row | {"adapter": str(adapter)}, [], batches)

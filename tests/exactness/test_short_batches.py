# SPDX-License-Identifier: Apache-2.0
"""A short last batch leaves micro-batches empty: they count nowhere, under every fold and schedule (errors below 1e-9)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_moefold import Fold, MoECausalLM
from lightning_moefold.testing import IGNORE, RankPool, make_batches, reference_run
from tests.exactness import compare, matrix, runs
from tests.exactness.shapes import checkpoint
from tests.quick import quick

MICROBATCHES = 4


def empty_rows(batch: dict[str, Tensor], first: int) -> dict[str, Tensor]:
    """The rows from ``first`` on hold padding alone, as those with which a loader fills its last batch."""
    filled = {name: tensor.clone() for name, tensor in batch.items()}
    filled["input_ids"][first:], filled["labels"][first:], filled["attention_mask"][first:] = 0, IGNORE, 0
    return filled


def short_batches(dp: int) -> list[list[dict[str, Tensor]]]:
    """Whole; fewer rows than micro-batches, not equally many on all ranks; filled up with rows of padding."""
    whole, few, filled = make_batches(3, dp, MICROBATCHES, compare.LENGTH, 96, seed=5, padding="right")
    few = [{name: tensor[: 1 + rank % 3] for name, tensor in batch.items()} for rank, batch in enumerate(few)]
    return [whole, few, [empty_rows(batch, 1 + (rank == 0)) for rank, batch in enumerate(filled)]]


@pytest.mark.parametrize(
    ("world", "fold", "change"),
    [
        pytest.param(4, "tp2 | etp2 ep2", {"sharding": "full"}, marks=pytest.mark.more),
        pytest.param(4, "cp2 | ep2", {"dispatch": "deduplicated"}, marks=pytest.mark.more),
        pytest.param(4, "pp2 | ep2", {"schedule": "1f1b"}, marks=pytest.mark.more),
        (4, "pp2 | etp2", {"schedule": "zbv", "sharding": "none"}),
        pytest.param(4, "pp2 tp2", {"schedule": "interleaved_1f1b", "dispatch": "allgather"}, marks=pytest.mark.more),
        pytest.param(2, "", {"sharding": "none"}, marks=pytest.mark.slow),
        pytest.param(4, "pp2 cp2 | ep2", {"schedule": "gpipe"}, marks=pytest.mark.slow),
        pytest.param(4, "pp2 | ep2", {"schedule": "interleaved_zero_bubble"}, marks=pytest.mark.slow),
        pytest.param(4, "pp2 | ep2", {"schedule": "dualpipev"}, marks=pytest.mark.slow),
        pytest.param(8, "tp2 pp2 | etp2 ep2", {"schedule": "1f1b"}, marks=pytest.mark.slow),
    ],
)
def test_empty_micro_batches_count_nowhere(
    pool: RankPool, folder: Path, world: int, fold: str, change: dict[str, Any]
) -> None:
    parsed = Fold.parse(fold, world)
    row = {**matrix.PLAIN, "family": "qwen3_moe", "shape": "12 experts", "microbatches": MICROBATCHES, **change}
    path = checkpoint(folder, row["family"], row["shape"], matrix.layers(parsed, row))
    compare.check_run(pool, path, parsed, row, (), short_batches(parsed.dp))


def losses(path: str, fold: str, batch: list[dict[str, Tensor]]) -> list[list[float]]:
    """Loss and auxiliary loss in training, in evaluation with labels, and without them; and the logits' shape."""
    spec = {"overrides": {"output_router_logits": True}, "num_microbatches": 2, "lr": 0.0}
    module = runs.Case(path, runs.RankRun(), spec)
    runs._fit(module, fold, [batch], spec)
    mine = batch[module.trainer.strategy.dp_rank]
    with torch.no_grad():
        labelled = module.model(**mine)
        bare = module.model(**{k: v for k, v in mine.items() if k != "labels"}, gather_logits=True)
    seen = [[module.run.losses[0], module.run.aux_losses[0]], [labelled.loss.item(), labelled.aux_loss.item()]]
    return [*seen, [bare.aux_loss.item()], list(bare.logits.shape)]


@pytest.mark.parametrize(("world", "fold"), quick([(2, "| ep2"), (4, "pp2 | ep2")], (4, "pp2 | ep2")))
@pytest.mark.parametrize("filled", quick([True, False], False))
@pytest.mark.more
def test_two_rows_over_two_data_ranks(pool: RankPool, folder: Path, world: int, fold: str, filled: bool) -> None:
    """The auxiliary loss is that of the rows there are: not half of it, in training and in evaluation."""
    path = checkpoint(folder, "qwen3_moe", "6 experts, tied", 2)
    whole = make_batches(1, 2, 2, 6, 96, seed=1, padding="right")[0]
    rows = [{name: tensor[:1] for name, tensor in batch.items()} for batch in whole]
    batch = [empty_rows(b, 1) for b in whole] if filled else rows
    alone = reference_run(path, [rows], config_overrides={"output_router_logits": True})
    model = MoECausalLM.from_pretrained(path, dtype=torch.float64, output_router_logits=True)
    joined = {name: torch.cat([r[name] for r in rows]) for name in rows[0]}
    aux = model(**joined).aux_loss.item()
    for found in pool.run(losses, str(path), fold, batch, ranks=world):
        training, evaluation, bare, shape = found
        assert training == pytest.approx([alone.losses[0], aux], rel=1e-9)
        assert evaluation == pytest.approx([alone.losses[0], aux], rel=1e-9)
        assert bare == pytest.approx([aux], rel=1e-9)
        assert shape == [1 + filled, 6, 96]

# SPDX-License-Identifier: Apache-2.0
"""Copies of experts for one pass change nothing: any plan computes what one process computes with Hugging Face's code."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_moefold import Fold
from lightning_moefold.balance.fast import ExpertCopies
from lightning_moefold.testing import RankPool, make_batches, make_checkpoint, reference_run
from tests.balance import plans
from tests.exactness import compare, runs

DRAWN = ExpertCopies(plans.drawn, 3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("copies") / "model"
    return str(make_checkpoint(folder, "qwen2_moe", num_experts=8, num_experts_per_tok=3, num_hidden_layers=4))


def run(pool: RankPool, checkpoint: str, fold: str, ranks: int, **more: Any) -> list[runs.RankRun]:
    """Three steps of two batches each with copies by chance, compared with one process; returns what the ranks saw."""
    parsed = Fold.parse(fold, ranks)
    microbatches = max(2, 2 * parsed.pp)
    dispatch = {"expert_copies": DRAWN} | more.pop("dispatch", {})
    batches = make_batches(6, parsed.dp, microbatches, 9, 96, seed=7, padding=more.pop("padding", "right"))
    spec = {
        "overrides": {"output_router_logits": True}, "clip": 0.5, "lr": 1e-2, "dispatch": dispatch,
        "num_microbatches": microbatches, "accumulate": 2, **more,
    }  # fmt: skip
    factor = dispatch.get("capacity_factor")
    expected = reference_run(
        checkpoint, batches, clip=0.5, config_overrides=spec["overrides"], num_microbatches=microbatches, accumulate=2,
        frozen=spec.get("frozen", ()), capacity=None if factor is None else (factor, "probs"),
    )  # fmt: skip
    actual = pool.run(runs.train, checkpoint, fold, batches, spec, ranks=ranks)
    compare.compare(actual, expected, 1e-9, f"{fold} {more}")
    assert all(seen.copies for seen in actual if seen.loads), "no copies were made"
    return actual


def test_two_ranks(pool: RankPool, checkpoint: str) -> None:
    run(pool, checkpoint, "| ep2", 2)

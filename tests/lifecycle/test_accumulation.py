# SPDX-License-Identifier: Apache-2.0
"""Batches accumulated by their labels: where the data stands in a checkpoint, and what cannot be counted ahead."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_moefold.testing import RankPool, make_checkpoint
from tests.lifecycle import jobs_accumulation
from tests.quick import quick
from tests.strategy.test_bad_input import sentence


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("model") / "qwen", "qwen3_moe", num_experts=4))


@pytest.mark.parametrize("data", quick(["Data", "CountsTrained"], "CountsTrained"))
def test_batches_that_were_looked_at_are_not_done(pool: RankPool, path: str, tmp_path: Path, data: str) -> None:
    """A checkpoint in the middle of a step goes on with the next batch, not with that of the next step, nor an earlier one."""
    for seen in pool.run(jobs_accumulation.places, path, str(tmp_path), data, ranks=2):
        assert seen == [({"done": number % 5}, {"at": number}) for number in range(1, 6)]


@pytest.mark.more
def test_what_cannot_be_counted_ahead(pool: RankPool, path: str) -> None:
    patterns = {
        "plain": "holds no MoECausalLM, whose labels are counted; leave it out.",
        "by hand": "accumulates by hand; leave it out.",
        "no mapping": "as the DataLoader gives it, which has none; give batches as mappings",
        "other labels": "but the model is called with others",
        "no labels": "training_step called none with labels",
        "loss_fn": "a loss_fn returns it afterwards",
        "iterator": "takes the dataloader_iter",
        "two calls": "no error",
    }
    for said in pool.run(jobs_accumulation.refusals, path, "| ep2", list(patterns), ranks=2):
        for name, pattern in patterns.items():
            assert pattern in said[name], f"{name}: {said[name]}"
            if pattern != "no error":
                sentence(said[name])

# SPDX-License-Identifier: Apache-2.0
"""What the matrix does not draw: weights of labels, small chunks, forward passes between steps, kernels of the optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_moefold import Fold
from lightning_moefold.testing import RankError, RankPool, make_batches, make_checkpoint, reference_run
from tests.exactness import compare, runs
from tests.quick import quick

FOLDS = ["tp2 | ep2", "tp2 | etp2", "| ep2", "| etp2", "cp2 | ep2"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("details") / "model", "qwen2_moe", vocab_size=97))


def _run(
    pool: RankPool, checkpoint: str, fold: str, change: Any, spec: dict[str, Any] | None = None, world: int = 2
) -> None:
    parsed = Fold.parse(fold, world)
    batches = make_batches(3, parsed.dp, 4 // parsed.dp, 10, 97, seed=5)
    for step in batches:
        for batch in step:
            change(batch)
    spec = {"overrides": {"output_router_logits": True}, "clip": 0.5, "lr": 1e-2, **(spec or {})}
    expected = reference_run(checkpoint, batches, clip=0.5, config_overrides=spec["overrides"])
    actual = pool.run(runs.train, checkpoint, fold, batches, spec, ranks=world)
    compare.compare(actual, expected, 1e-9, f"{fold} {spec}")


def _weigh(batch: dict[str, torch.Tensor]) -> None:
    batch["loss_weights"] = torch.rand(
        batch["labels"].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )


@pytest.mark.parametrize("fold", quick(FOLDS, "tp2 | etp2"))
@pytest.mark.more
def test_loss_weights(pool: RankPool, checkpoint: str, fold: str) -> None:
    _run(pool, checkpoint, fold, _weigh)


@pytest.mark.parametrize("fold", quick(["tp2 | ep2", "| ep2"], "tp2 | ep2"))
@pytest.mark.more
def test_small_chunks_of_an_uneven_vocabulary(pool: RankPool, checkpoint: str, fold: str) -> None:
    _run(pool, checkpoint, fold, lambda batch: None, {"chunk_elements": 150})


@pytest.mark.parametrize("fold", quick(["tp2 | ep2", "tp2 | etp2", "cp2 | ep2"], "tp2 | ep2"))
def test_different_batches_in_a_tp_group_are_refused(pool: RankPool, checkpoint: str, fold: str) -> None:
    batches = make_batches(1, 1, 2, 10, 97)
    with pytest.raises(RankError) as caught:
        pool.run(runs.train, checkpoint, fold, batches, {"shift_tokens_by_rank": True}, ranks=2)
    assert set(caught.value.exception_types.values()) == {"BatchError"}
    assert all("different batches" in message for message in caught.value.messages.values())


@pytest.mark.parametrize("sharding", quick(["optimizer", "full"], "full"))
@pytest.mark.parametrize("fold", quick(["tp2 | ep2", "| ep2"], "| ep2"))
@pytest.mark.more
def test_a_forward_before_the_step_leaves_no_stale_weights(
    pool: RankPool, checkpoint: str, fold: str, sharding: str
) -> None:
    _run(pool, checkpoint, fold, lambda batch: None, {"peek": True, "sharding": sharding})


@pytest.mark.parametrize(
    "kernel", [{"fused": True}, pytest.param({"foreach": True}, marks=pytest.mark.slow)], ids=["fused", "foreach"]
)
@pytest.mark.parametrize("fold", quick(["| ep2", "tp2 | ep2", "tp2 | ep4", "tp2 | etp2 ep2"], "tp2 | ep2"))
@pytest.mark.more
def test_one_optimizer_for_both_meshes(pool: RankPool, checkpoint: str, fold: str, kernel: dict[str, bool]) -> None:
    _run(pool, checkpoint, fold, lambda batch: None, {"adamw": kernel}, world=4 if "tp2 | e" in fold else 2)


@pytest.mark.parametrize("fold", quick(["tp2 | ep2", "cp2 | ep2"], "tp2 | ep2"))
@pytest.mark.more
def test_tokens_are_counted_once_whatever_is_recomputed(pool: RankPool, checkpoint: str, fold: str) -> None:
    batches = make_batches(2, 1, 4, 10, 97, seed=5)
    loads = []
    for recompute in (None, "selective", "full"):
        ranks = pool.run(runs.train, checkpoint, fold, batches, {"recompute": recompute}, ranks=2)
        loads.append({layer: sum(run.loads[layer] for run in ranks) for layer in ranks[0].loads})
    assert all(int(load_E.sum()) == 2 * 4 * 10 * 2 for load_E in loads[0].values())  # batches, rows, tokens, top-k
    for found in loads[1:]:
        assert all(torch.equal(found[layer], loads[0][layer]) for layer in found)

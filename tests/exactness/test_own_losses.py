# SPDX-License-Identifier: Apache-2.0
"""``loss_fn``, own terms beside the model's loss, a second model, and two calls in a step: exact under every fold."""

from __future__ import annotations

import pytest
import torch

from lightning_moefold import Fold
from lightning_moefold.testing import RankPool, assert_close_by_name, make_batches, make_checkpoint
from lightning_moefold.testing.pieces import assemble
from tests.exactness import jobs_own_losses
from tests.quick import quick

CASES = [
    ("focal", 2, "tp2 | ep2", "optimizer"),
    pytest.param("focal", 4, "| ep2", "full", marks=pytest.mark.slow),
    ("preference", 4, "tp2 | ep4", "full"),
    pytest.param("preference", 2, "| etp2", "optimizer", marks=pytest.mark.slow),
    ("distillation", 2, "tp2 | etp2", "none"),
    pytest.param("distillation", 2, "| ep2", "full", marks=pytest.mark.slow),
    ("term", 4, "tp2 | ep4", "optimizer"),
    pytest.param("term", 2, "", "full", marks=pytest.mark.slow),
    ("term", 4, "tp2 | etp2 ep2", "none"),
    ("calls", 4, "tp2 | ep2", "full"),
    pytest.param("calls", 2, "| ep2", "optimizer", marks=pytest.mark.slow),
    ("focal", 4, "pp2 | ep2", "optimizer"),
    ("distillation", 4, "tp2 pp2", "none"),
    ("calls", 2, "pp2", "optimizer"),
    ("preference", 2, "pp2", "full"),
    ("focal", 4, "cp2 | ep4", "full"),
    ("preference", 4, "tp2 cp2 | ep2", "optimizer"),
    ("distillation", 2, "cp2", "optimizer"),
    ("term", 4, "cp2 | ep2", "optimizer"),
]
QUICK = [
    ("term", 4, "tp2 | etp2 ep2", "none"),
    ("focal", 4, "pp2 | ep2", "optimizer"),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("losses")
    kinds = {"student": ("qwen2_moe", 0), "teacher": ("mixtral", 3)}
    return [str(make_checkpoint(folder / name, kind, vocab_size=97, seed=seed)) for name, (kind, seed) in kinds.items()]


@pytest.mark.parametrize(("loss", "world", "fold", "sharding"), quick(CASES, *QUICK))
def test_own_losses(pool: RankPool, checkpoints: list[str], loss: str, world: int, fold: str, sharding: str) -> None:
    student, teacher = checkpoints
    dp = Fold.parse(fold, world).dp
    rows = 4 if loss == "preference" and "pp" in fold else 2  # a pair in each micro-batch
    batches = make_batches(3, dp, rows, 9, 97, seed=8, ignore="uneven")
    spec = {"loss": loss, "clip": 0.5, "lr": 1e-2, "sharding": sharding}
    spec |= {"teacher": teacher} if loss == "distillation" else {}
    spec |= {"num_microbatches": 2} if "pp" in fold else {}
    expected = jobs_own_losses.train_alone(student, batches, spec)
    actual = pool.run(jobs_own_losses.train, student, fold, batches, spec, ranks=world)
    for rank, run in enumerate(actual):
        mine = [step[Fold.parse(fold, world).coordinates(rank)["dp"]] for step in expected.losses]
        torch.testing.assert_close(run.losses, mine, rtol=1e-9, atol=0)
    what = f"{loss}, {fold}"
    for step, grads in enumerate(expected.grads):
        assert_close_by_name(assemble(r.grads[step] for r in actual), grads, 1e-9, f"gradients of step {step}, {what}")
    found = {n: t for n, t in assemble(r.weights for r in actual).items() if not n.startswith("teacher.")}
    assert_close_by_name(found, expected.weights, 1e-9, f"weights, {what}")


@pytest.mark.more
def test_a_loss_fn_beside_the_auxiliary_loss_in_a_pipeline(pool: RankPool, checkpoints: list[str]) -> None:
    """Its weight, here the number of labels, decides what the auxiliary loss weighs beside it."""
    batches = make_batches(3, 1, 4, 9, 97, seed=8, ignore="uneven")
    spec = {"loss": "focal", "clip": 0.5, "num_microbatches": 2, "overrides": {"output_router_logits": True}}
    [expected] = pool.run(jobs_own_losses.train, checkpoints[0], "", batches, spec, ranks=1)
    actual = pool.run(jobs_own_losses.train, checkpoints[0], "pp2", batches, spec, ranks=2)
    for run in actual:
        torch.testing.assert_close(run.losses, expected.losses, rtol=1e-9, atol=0)
    assert len(expected.grads) == 3
    for step, grads in enumerate(expected.grads):
        assert_close_by_name(
            assemble(r.grads[step] for r in actual), assemble([grads]), 1e-9, f"gradients of step {step}"
        )

# SPDX-License-Identifier: Apache-2.0
"""Batches accumulated by their labels are one large batch, in one process (float64, errors below 1e-9)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_moefold import Fold
from lightning_moefold.models.batch import label_weight
from lightning_moefold.testing import (
    IGNORE,
    RankPool,
    assert_close_by_name,
    make_batches,
    make_checkpoint,
    reference_run,
)
from lightning_moefold.testing.pieces import assemble
from tests.exactness import compare, runs

ACCUMULATE = 3


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "qwen"
    return str(make_checkpoint(folder, "qwen3_moe", num_hidden_layers=4, num_experts=4))


def unequal_batches(dp: int, microbatches: int, weights: bool) -> list[list[dict[str, Tensor]]]:
    """Two steps, of which the second is short. Few labels, then many; a batch has none at all."""
    batches = make_batches(ACCUMULATE + 2, dp, microbatches, compare.LENGTH, 96, seed=4, ignore="uneven")
    for rank, batch in enumerate(batches[0]):
        batch["labels"][:, : -1 - rank % 2] = IGNORE
    for batch in batches[1]:
        batch["labels"][:] = IGNORE
    for batch in (b for step in batches for b in step if weights):
        batch["document_ids"] = torch.tensor([0, 0, 0, 1, 1, 2, 2]).expand_as(batch["labels"]).contiguous()
        batch["loss_weights"] = torch.rand(batch["labels"].shape, generator=torch.Generator().manual_seed(9)).double()
    return batches


def whole_steps(batches: list[list[dict[str, Tensor]]]) -> list[list[dict[str, Tensor]]]:
    """The batches of each step as one."""
    steps = [batches[i : i + ACCUMULATE] for i in range(0, len(batches), ACCUMULATE)]
    return [
        [{name: torch.cat([batch[name] for batch in mine]) for name in mine[0]} for mine in zip(*step, strict=True)]
        for step in steps
    ]


CASES = [
    (2, "| ep2", {"stream": True}),
    pytest.param(4, "tp2 | etp2 ep2", {"sharding": "none", "weights": True}, marks=pytest.mark.more),
    pytest.param(4, "cp2 | ep2", {"sharding": "full"}, marks=pytest.mark.more),
    pytest.param(4, "pp2 | ep2", {"schedule": "1f1b"}, marks=pytest.mark.more),
    (4, "tp2 pp2 | ep2", {"schedule": "zbv", "weights": True, "stream": True}),
    pytest.param(4, "pp2 | etp2", {"schedule": "interleaved_1f1b", "sharding": "none"}, marks=pytest.mark.slow),
    pytest.param(4, "cp2 pp2", {"schedule": "gpipe", "weights": True}, marks=pytest.mark.slow),
    pytest.param(8, "tp2 pp2 | etp2 ep2", {"schedule": "1f1b"}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("world", "fold", "spec"), CASES, ids=[str(getattr(c, "values", c)[1]) for c in CASES])
def test_accumulated_by_labels(pool: RankPool, path: str, world: int, fold: str, spec: dict[str, Any]) -> None:
    parsed = Fold.parse(fold, world)
    m = 4 if parsed.pp > 1 else 1
    batches = unequal_batches(parsed.dp, m, spec.get("weights", False))
    overrides = {"output_router_logits": True}
    spec = {
        "accumulate": ACCUMULATE,
        "clip": 0.5,
        "num_microbatches": m,
        "overrides": overrides,
        "per_token": True,
    } | spec
    if "schedule" in spec:
        chunks = 2 if spec["schedule"] in ("zbv", "interleaved_1f1b") else 1
        spec["pipeline"] = {"pipeline_schedule": spec["schedule"], "num_stages_per_rank": chunks}
    # A large batch whose micro-batches are those of the batches of the step: fewer in the last step.
    expected = reference_run(
        path, whole_steps(batches), clip=0.5, config_overrides=overrides, num_microbatches=ACCUMULATE * m
    )
    actual = pool.run(runs.train, path, fold, batches, spec, ranks=world, timeout=180)
    what = f"{fold} {spec}"
    weights = [float(sum(_weight(b) for b in batch)) for batch in batches]
    for run in actual:
        assert run.losses == actual[0].losses, what
        for step, loss in enumerate(expected.losses):
            of = range(step * ACCUMULATE, min((step + 1) * ACCUMULATE, len(batches)))
            language = sum(weights[i] * run.lm_losses[i] for i in of) / sum(weights[i] for i in of)
            auxiliary = sum(run.aux_losses[i] for i in of) / len(of)
            assert language + 0.05 * auxiliary == pytest.approx(loss, rel=1e-9), what
        assert run.grad_norms == pytest.approx(expected.grad_norms, rel=1e-9), what
    for step, grads in enumerate(expected.grads):
        found = {**dict.fromkeys(grads), **assemble(run.grads[step] for run in actual)}
        assert_close_by_name(found, grads, 1e-9, f"gradients of step {step}, {what}")
    assert_close_by_name(assemble(run.weights for run in actual), expected.weights, 1e-9, f"weights, {what}")


def _weight(batch: dict[str, Tensor]) -> Tensor:
    return label_weight(batch, None)

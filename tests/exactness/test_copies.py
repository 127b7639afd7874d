# SPDX-License-Identifier: Apache-2.0
"""Copies of experts for one pass change nothing: any plan computes what one process computes with Hugging Face's code."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_moefold import Fold
from lightning_moefold.balance.costs import BalanceCosts
from lightning_moefold.balance.fast import ExpertCopies
from lightning_moefold.testing import RankPool, make_batches, make_checkpoint, reference_run
from tests.balance import plans
from tests.exactness import compare, runs
from tests.quick import quick

DRAWN = ExpertCopies(plans.drawn, 3)
#: Of a machine whose links cost almost nothing, where copies pay for a few rows already.
CHEAP = BalanceCosts.assumed("cpu", 1 << 12, parts=2, byte_ps=1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("copies") / "model"
    return str(make_checkpoint(folder, "qwen2_moe", num_experts=8, num_experts_per_tok=3, num_hidden_layers=4))


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ep4": ("| ep4", {"dispatch": {"dispatch_chunks": 2, "capacity_factor": 0.9}}),
    "ep2 etp2": ("tp2 | ep2 etp2", {"recompute": "full"}),
    "deduplicated": ("tp2 | ep2 etp2", {"dispatch": {"dispatcher": "deduplicated", "capacity_factor": 0.9}}),
    "hierarchical": ("| ep4", {"dispatch": {"dispatcher": "hierarchical", "node_size": 2}, "recompute": "full"}),
    "allgather": ("tp2 | ep2 etp2", {"dispatch": {"dispatcher": "allgather"}, "recompute": "full"}),
    "allgather, edp2": ("| ep2", {"dispatch": {"dispatcher": "allgather", "capacity_factor": 0.9}, "accumulate": 2}),
    "deduplicated, zbv": ("pp2 | ep2", {"dispatch": {"dispatcher": "deduplicated"}, "pipeline": {"pipeline_schedule": "zbv"}}),
    # Two replicas of every expert: a copy made outside of FSDP2's unit would lose the gradient of all of them.
    "ep2 edp2": ("| ep2", {"accumulate": 2}),
    "ep2 edp2, let go": ("cp2 | ep2", {"sharding": "full", "recompute": "selective"}),
    "ep2 edp2, frozen": ("tp2 | ep2", {"sharding": "none", "frozen": ("*.experts.up_proj",)}),
    "1f1b": ("pp2 | ep2", {"pipeline": {"pipeline_schedule": "1f1b"}}),
    "zbv": ("pp2 | ep2", {"pipeline": {"pipeline_schedule": "zbv"}}),
    "interleaved zero bubble": (
        "pp2 | ep2",
        {"pipeline": {"pipeline_schedule": "interleaved_zero_bubble", "num_stages_per_rank": 2}, "frozen": ("*.down_proj",)},
    ),
    "dualpipev": ("pp2 | ep2", {"pipeline": {"pipeline_schedule": "dualpipev"}}),
    "dualpipev, joint": (
        "pp2 | ep2",
        {"pipeline": {"pipeline_schedule": "dualpipev"}, "dispatch": {"expert_copies": ExpertCopies("joint", 3, CHEAP)}},
    ),
}  # fmt: skip
#: What each of them shows, some of the others do, too.
SLOW = ("1f1b", "interleaved zero bubble", "dualpipev", "ep2 edp2, let go", "deduplicated, zbv")

CHOSEN = quick([pytest.param(c, marks=[pytest.mark.slow] if c in SLOW else []) for c in CASES], "ep2 etp2", "zbv")


@pytest.mark.parametrize("case", CHOSEN)
def test_any_plan_computes_the_same(pool: RankPool, checkpoint: str, case: str) -> None:
    """Three steps with copies by chance in every layer, compared with one process."""
    fold, more = CASES[case]
    parsed = Fold.parse(fold, 4)
    accumulate, microbatches = more.get("accumulate", 1), 4 if parsed.pp > 1 else 2
    dispatch = {"expert_copies": DRAWN} | more.get("dispatch", {})
    batches = make_batches(3 * accumulate, parsed.dp, microbatches, 9, 96, seed=7, padding="right")
    spec = {
        "overrides": {"output_router_logits": True}, "clip": 0.5, "lr": 1e-2, "num_microbatches": microbatches, **more,
        "dispatch": dispatch,
    }  # fmt: skip
    factor = dispatch.get("capacity_factor")
    expected = reference_run(
        checkpoint, batches, clip=0.5, config_overrides=spec["overrides"], num_microbatches=microbatches,
        accumulate=accumulate, frozen=spec.get("frozen", ()), capacity=None if factor is None else (factor, "probs"),
    )  # fmt: skip
    actual = pool.run(runs.train, checkpoint, fold, batches, spec, ranks=4)
    compare.compare(actual, expected, 1e-9, case)
    assert all(seen.copies for seen in actual), "no copies were made"


@pytest.mark.more
def test_mixed_precision(pool: RankPool, checkpoint: str) -> None:
    """Copies and their gradients travel in bfloat16: losses of four steps differ by its rounding, and weights stay in float32."""
    batches = make_batches(4, 2, 2, 9, 96, seed=7)
    spec = {"precision": "bf16-mixed", "clip": 0.5, "lr": 1e-2}
    plain, copied = (
        pool.run(runs.train, checkpoint, "| ep2", batches, {**spec, "dispatch": dispatch}, ranks=2)[0]
        for dispatch in ({}, {"expert_copies": DRAWN})
    )
    assert copied.copies > 0
    assert copied.losses == pytest.approx(plain.losses, rel=5e-3)
    assert copied.losses[0] > copied.losses[-1]

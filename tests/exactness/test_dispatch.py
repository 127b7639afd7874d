# SPDX-License-Identifier: Apache-2.0
"""Every way of dispatch, dropless and dropping, computes what one process computes with Hugging Face's code (float64, 1e-9)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_moefold import Fold
from lightning_moefold.testing import RankPool, hf_reference, make_batches, make_checkpoint, reference_run
from lightning_moefold.testing.dropping import DroppingReference
from tests.exactness import compare, runs
from tests.quick import quick

DISPATCH: dict[str, dict[str, Any]] = {
    "allgather": {"dispatcher": "allgather"},
    "deduplicated": {"dispatcher": "deduplicated"},
    "hierarchical": {"dispatcher": "hierarchical", "node_size": 2},
    "chunks": {"dispatch_chunks": 2},
    "probs": {"capacity_factor": 0.9, "drop_policy": "probs"},
    "position": {"capacity_factor": 0.8, "drop_policy": "position", "dispatcher": "deduplicated"},
    "gathered probs": {"capacity_factor": 1.1, "dispatcher": "allgather"},
    "padded": {"capacity_factor": 0.9, "pad_to_capacity": True},
    "padded chunks": {"capacity_factor": 0.7, "drop_policy": "position", "pad_to_capacity": True, "dispatch_chunks": 2},
    "much room": {"capacity_factor": 50.0, "pad_to_capacity": True},
}
SMALL = ["", "tp2 | ep2", "| ep2", "cp2 | etp2"]
LARGE = ["tp2 cp2 | ep4", "tp2 | ep2 etp2", "cp2 pp2 | ep2", "tp2 pp2 | etp2", "| ep2"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("dispatch") / "model"
    return str(make_checkpoint(folder, "qwen2_moe", num_experts=8, num_experts_per_tok=3, num_hidden_layers=2))


def _run(pool: RankPool, checkpoint: str, fold: str, dispatch: str, padding: str, ranks: int, **more: Any) -> None:
    parsed, fields = Fold.parse(fold, ranks), DISPATCH[dispatch]
    batches = make_batches(2, parsed.dp, max(2, 4 // parsed.dp), 9, 96, seed=7, padding=padding)
    spec = {
        "overrides": {"output_router_logits": True}, "clip": 0.5, "lr": 1e-2, "dispatch": fields, "num_microbatches": 2, **more,
    }  # fmt: skip
    factor, policy = fields.get("capacity_factor"), fields.get("drop_policy", "probs")
    expected = reference_run(
        checkpoint, batches, clip=0.5, config_overrides=spec["overrides"], num_microbatches=2,
        capacity=None if factor is None else (factor, policy),
    )  # fmt: skip
    actual = pool.run(runs.train, checkpoint, fold, batches, spec, ranks=ranks)
    compare.compare(actual, expected, 1e-9, f"{fold} {dispatch} {padding}")
    dropped = sum(run.dropped for run in actual)
    assert (dropped > 0) == (factor is not None and factor < 50), f"{dropped} dropped"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dispatch", "fold"), [(d, SMALL[i % 3 + 1]) for i, d in enumerate(DISPATCH)] + [("probs", "cp2 | etp2"), ("padded", "")]
)  # fmt: skip
def test_two_ranks(pool: RankPool, checkpoint: str, dispatch: str, fold: str) -> None:
    _run(pool, checkpoint, fold, dispatch, "right" if fold.startswith("tp") else "left", 2 if fold else 1)


@pytest.mark.parametrize(
    ("dispatch", "fold"),
    quick(
        [(d, LARGE[i % 4]) for i, d in enumerate(DISPATCH)] + [("probs", "tp2 cp2 | ep4")],
        ("hierarchical", "cp2 pp2 | ep2"), ("position", "tp2 | ep2 etp2"),
    ),
)  # fmt: skip
def test_four_ranks(pool: RankPool, checkpoint: str, dispatch: str, fold: str) -> None:
    _run(
        pool,
        checkpoint,
        fold,
        dispatch,
        "none" if "pp" in fold else "right",
        4,
        recompute=None if "pp" in fold else "full",
    )


@pytest.mark.parametrize(
    ("fold", "node_size", "expected"),
    [
        ("tp2 cp2 | ep4", 2, "HierarchicalDispatcher"),
        pytest.param("cp2 | ep4", 2, "HierarchicalDispatcher", marks=pytest.mark.slow),
        pytest.param("tp2 | ep4", 4, "DeduplicatedDispatcher", marks=pytest.mark.slow),
    ],
)
@pytest.mark.more
def test_chosen_by_node(
    pool: RankPool, tmp_path_factory: pytest.TempPathFactory, fold: str, node_size: int, expected: str
) -> None:
    """What ``"auto"`` takes where ep spans nodes is the same on every rank, and exact."""
    folder = tmp_path_factory.mktemp("auto") / "model"
    checkpoint = str(make_checkpoint(folder, "qwen2_moe", num_experts=8, num_experts_per_tok=4, num_hidden_layers=2))
    dp = Fold.parse(fold, 4).dp
    batches = make_batches(2, dp, 4 // dp, 9, 96, seed=7, padding="right")
    spec = {"clip": 0.5, "lr": 1e-2, "dispatch": {"dispatcher": "auto", "node_size": node_size}}
    actual = pool.run(runs.train, checkpoint, fold, batches, spec, ranks=4)
    assert [run.dispatchers for run in actual] == [{expected}] * 4
    compare.compare(actual, reference_run(checkpoint, batches, clip=0.5), 1e-9, fold)


@pytest.mark.parametrize("fold", quick(["cp2 | ep2", "tp2 | etp2"], "cp2 | ep2"))
def test_alike_but_for_rounding(pool: RankPool, checkpoint: str, fold: str) -> None:
    """A row's first token, repeated, has one hidden state; who is served is a matter of position, not of rounding."""
    batches = make_batches(1, 1, 3, 12, 96, seed=3)
    for batch in batches[0]:
        batch["input_ids"][:, :8] = batch["input_ids"][:, :1]
    expected = reference_run(checkpoint, batches, clip=0.5, capacity=(0.6, "probs"))
    spec = {"clip": 0.5, "lr": 1e-2, "dispatch": {"capacity_factor": 0.6}}
    compare.compare(pool.run(runs.train, checkpoint, fold, batches, spec, ranks=2), expected, 1e-9, fold)


@pytest.mark.slow
@pytest.mark.parametrize(("fold", "ranks"), [(f, 2 if f else 1) for f in SMALL] + [(f, 4) for f in LARGE])
@pytest.mark.parametrize("dispatch", DISPATCH)
def test_every_way_under_every_fold(pool: RankPool, checkpoint: str, dispatch: str, fold: str, ranks: int) -> None:
    _run(pool, checkpoint, fold, dispatch, "left" if "cp" in fold else "right", ranks)


def test_the_oracle_drops(checkpoint: str) -> None:
    """Served choices of an expert in a row are at most its capacity, and those of highest probability."""
    model = hf_reference(checkpoint)
    weights: list[torch.Tensor] = []
    reference = DroppingReference(model, 0.5, "probs")
    for module in model.modules():
        if type(module).__name__.endswith("TopKRouter"):
            module.register_forward_hook(lambda _, __, output: weights.append(output[1].detach()))
    batch = make_batches(1, 1, 2, 9, 96)[0][0]
    model(input_ids=batch["input_ids"], use_cache=False)
    served = sum(int((w > 0).sum()) for w in weights)
    assert served + reference.dropped == len(weights) * 2 * 9 * 3
    assert reference.dropped > 0
    assert served <= len(weights) * 2 * 8 * 2  # rows x experts x ceil(0.5 * 3 * 9 / 8)

# SPDX-License-Identifier: Apache-2.0
"""Makes a case, runs it under a fold and in one process, and compares everything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lightning_moefold import Fold, MoEConfig
from lightning_moefold.testing import (
    RankPool,
    ReferenceRun,
    assert_close_by_name,
    make_batches,
    make_checkpoint,
    reference_run,
)
from lightning_moefold.testing.pieces import assemble
from tests.exactness import runs

STEPS = 3
#: Rows of the global batch, whatever the number of data ranks.
ROWS = 16

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {"num_experts": 8},
    "vocabulary of 97": {"num_experts": 8, "vocab_size": 97},
    "60 experts": {"num_experts": 60, "num_experts_per_tok": 4, "moe_ffn": 8},
    "28 heads": {"num_experts": 8, "hidden_size": 56, "num_attention_heads": 28, "num_key_value_heads": 4},
    "one key/value head": {"num_experts": 8, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "dense layers": {"num_experts": 8, "num_hidden_layers": 3, "dense": True, "pad_token_id": 3},
}

FACTORS: dict[str, list[Any]] = {
    "family": ["mixtral", "qwen2_moe", "qwen3_moe"],
    "shape": list(SHAPES),
    "accumulate": [1, 2],
    "auxiliary": [True, False],
    "microbatches": [1, 2],
    "padding": ["none", "right", "left"],
    "ignore": ["none", "uneven", "one_rank_empty"],
    "frozen": [(), ("*.mlp.gate.weight",), ("*.experts.*",), ("model.embed_tokens.*", "model.layers.0.*")],
    "sharding": ["optimizer", "full", "none"],
    "optimizer": ["adamw", "sgd"],
    "exchange": ["ring", "all_gather", "all_to_all"],
    "recompute": [None, "selective", "full"],
}


def shape_fields(family: str, shape: str) -> dict[str, Any]:
    """Config fields of a shape, in the words of a family."""
    fields = dict(SHAPES[shape])
    width = fields.pop("moe_ffn", 16)
    fields["intermediate_size" if family == "mixtral" else "moe_intermediate_size"] = width
    dense = fields.pop("dense", False)
    if family == "mixtral":
        return fields
    fields["intermediate_size"] = 24
    if family == "qwen2_moe":
        fields["shared_expert_intermediate_size"] = 24
    fields |= (
        {"decoder_sparse_step": 2, "mlp_only_layers": []}
        if dense
        else {"mlp_only_layers": [1]}
        if family == "qwen3_moe"
        else {}
    )
    return fields


def checkpoint(folder: Path, family: str, shape: str, layers: int | None = None) -> Path:
    """The checkpoint of a family and shape, made once; ``layers`` replaces its number of layers."""
    path = folder / f"{family}-{shape.replace('/', ' ')}-{layers}"
    if not path.exists():
        more = {} if layers is None else {"num_hidden_layers": layers}
        make_checkpoint(path, family, **{**shape_fields(family, shape), **more})
    return path


def spec_of(row: dict[str, Any]) -> dict[str, Any]:
    """What both runs are told."""
    return {
        "overrides": {"output_router_logits": row["auxiliary"]},
        "accumulate": row["accumulate"],
        "num_microbatches": row["microbatches"],
        "frozen": row["frozen"],
        "sharding": row["sharding"],
        "optimizer": row["optimizer"],
        "pipeline": row.get("pipeline", {}),
        "recompute": row.get("recompute"),
        "zero_everything": row.get("zero_everything", False),
        "clip": 0.5,
        "lr": 1e-2,
    }


def check(pool: RankPool, folder: Path, fold: Fold, row: dict[str, Any], seed: int = 0) -> None:
    """Trains under ``fold`` and in one process with Hugging Face's code in float64, and compares (errors < 1e-9)."""
    path, spec = checkpoint(folder, row["family"], row["shape"], row.get("layers")), spec_of(row)
    spec["exchange"] = _legal_exchange(row.get("exchange", "ring"), fold, MoEConfig.from_pretrained(path))
    vocab = SHAPES[row["shape"]].get("vocab_size", 96)
    batches = make_batches(
        STEPS * row["accumulate"],
        fold.dp,
        row.get("rows", ROWS) // fold.dp,
        7,
        vocab,
        seed=seed,
        padding=row["padding"],
        ignore=row["ignore"],
    )
    expected = reference_run(
        path, batches, clip=spec["clip"], lr=spec["lr"], optimizer=spec["optimizer"], accumulate=spec["accumulate"],
        config_overrides=spec["overrides"], frozen=spec["frozen"], num_microbatches=spec["num_microbatches"],
    )  # fmt: skip
    actual = pool.run(runs.train, str(path), str(fold), batches, spec, ranks=fold.world_size, timeout=180)
    compare(actual, expected, 1e-9, f"{fold} {row}")


def _legal_exchange(wanted: str, fold: Fold, config: MoEConfig) -> str:
    """All-to-all cuts the heads of a tp rank over cp; where it cannot, a ring takes its place."""
    heads = (config.num_attention_heads, config.num_key_value_heads)
    return "ring" if wanted == "all_to_all" and any(n % (fold.tp * fold.cp) for n in heads) else wanted


def compare(actual: list[runs.RankRun], expected: ReferenceRun, tolerance: float, what: str) -> None:
    """Losses on every rank, norms, every gradient of every step, and the weights at the end."""
    for run in actual:
        assert run.losses == actual[0].losses, f"ranks disagree on the loss: {what}"
        assert run.grad_norms == actual[0].grad_norms, f"ranks disagree on the norm: {what}"
    _close(actual[0].losses, expected.losses, tolerance, f"losses, {what}")
    _close(actual[0].grad_norms, expected.grad_norms, tolerance, f"norms, {what}")
    for step, grads in enumerate(expected.grads):
        found = {**dict.fromkeys(grads), **assemble(run.grads[step] for run in actual)}
        assert_close_by_name(found, grads, tolerance, f"gradients of step {step}, {what}")
    assert_close_by_name(assemble(run.weights for run in actual), expected.weights, tolerance, f"weights, {what}")


def _close(actual: list[float], expected: list[float], tolerance: float, what: str) -> None:
    a, b = torch.tensor(actual, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64)
    assert a.shape == b.shape, f"{what}: {len(a)} values, not {len(b)}"
    error = ((a - b).abs() / b.abs().clamp(min=1e-30)).max().item()
    assert error < tolerance, f"{what}: {actual} is not {expected} (error {error:.1e})"

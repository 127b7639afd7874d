# SPDX-License-Identifier: Apache-2.0
"""Runs a case under a fold and in one process, and compares everything."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lightning_moefold import Fold
from lightning_moefold.testing import (
    RankPool,
    ReferenceRun,
    assert_close_by_name,
    make_batches,
    reference_run,
)
from lightning_moefold.testing.pieces import assemble
from tests.exactness import matrix, runs
from tests.exactness.matrix import Row
from tests.exactness.shapes import SHAPES, checkpoint

STEPS = 3
LENGTH = 7


def check(pool: RankPool, folder: Path, fold: Fold, row: Row, seed: int = 0) -> float:
    """Trains a case of the matrix under ``fold`` and in one process with Hugging Face's code, and compares.

    Args:
        pool: Of enough ranks.
        folder: Where checkpoints are kept.
        fold: Of the parallel run.
        row: A value for each factor of the matrix.
        seed: Of the tokens.

    Returns:
        The largest error, below 1e-9.
    """
    path = checkpoint(folder, row["family"], row["shape"], matrix.layers(fold, row))
    # Two steps where batches accumulate and three where they do not, which the optimizer's momenta need.
    number = row["accumulate"] * (STEPS - (row["accumulate"] > 1))
    batches = draw_batches(fold, row, number, SHAPES[row["shape"]].get("vocab_size", 96), seed)
    return check_run(pool, path, fold, row, matrix.frozen_patterns(fold, row), batches)


def check_run(
    pool: RankPool, path: Path, fold: Fold, row: Row, frozen: Sequence[str], batches: list[list[dict[str, Tensor]]]
) -> float:
    """Trains a checkpoint on ``batches[batch][data rank]`` both ways in float64, and compares everything (errors < 1e-9).

    Args:
        pool: Of enough ranks.
        path: The checkpoint.
        fold: Of the parallel run.
        row: Of its factors, those that are about training; ``optimizer`` may be a factory, with ``zero_everything``; and
            ``adapter``, a directory of one; ``storage``, the dtype in which the weights of the model are stored; and ``quantize``,
            with the checkpoint of the rounded weights as ``rounded``.
        frozen: Patterns of names.
        batches: Of every data rank.

    Returns:
        The largest error.
    """
    spec = {
        "overrides": {"output_router_logits": row["auxiliary"]},
        "accumulate": row["accumulate"],
        "num_microbatches": row["microbatches"],
        "frozen": frozen,
        "sharding": row["sharding"],
        "optimizer": row["optimizer"],
        "exchange": row["exchange"] or "auto",
        "recompute": row["recompute"],
        "offload": row.get("offload", False),
        "dispatch": {"dispatch_chunks": 2} if row["dispatch"] == "chunks" else {"dispatcher": row["dispatch"]},
        "zero_everything": row.get("zero_everything", False),
        "clip": 0.5,
        "lr": 1e-2,
    }
    spec |= {name: row[name] for name in ("adapter", "storage") if name in row}
    if fold.pp > 1:
        plan = matrix.plan(row)
        spec["pipeline"] = {"pipeline_schedule": plan.schedule, "num_stages_per_rank": plan.stages_per_rank}
        spec["pipeline"] |= {"pipeline_split": row["split"]} if "split" in row else {}
    if row.get("moves"):
        spec["moves"] = {"keep": False}
    expected = reference_run(
        row.get("rounded", path), batches,
        clip=spec["clip"], lr=spec["lr"], optimizer=spec["optimizer"], accumulate=spec["accumulate"],
        config_overrides=spec["overrides"], frozen=spec["frozen"], num_microbatches=spec["num_microbatches"],
        adapter=row.get("adapter"),
    )  # fmt: skip
    if "quantize" in row:  # and these are no parameters
        spec["overrides"] = {**spec["overrides"], "quantize": row["quantize"]}
        kept = (n for n in expected.weights if "lora_" in n or not re.search(r"(_proj\.weight|experts\.\w+_proj)$", n))
        expected = replace(expected, weights={name: expected.weights[name] for name in kept})
    actual = pool.run(runs.train, str(path), str(fold), batches, spec, ranks=fold.world_size, timeout=180)
    return compare(actual, expected, 1e-9, f"{fold} {row}")


def draw_batches(
    fold: Fold, row: Row, number: int, vocab: int, seed: int = 0, length: int = LENGTH
) -> list[list[dict[str, Tensor]]]:
    """``[batch][data rank]`` of random tokens as the row wants them."""
    batches = make_batches(
        number, fold.dp, matrix.rows_per_rank(fold, row), length, vocab, seed=seed, padding=row["padding"],
        ignore=row["ignore"],
    )  # fmt: skip
    if row["documents"]:
        generator = torch.Generator().manual_seed(seed)
        for batch in (rank for step in batches for rank in step):
            borders = torch.rand(batch["input_ids"].shape, generator=generator) < 0.3
            batch["document_ids"] = borders.long().cumsum(1)
    return batches


def compare(actual: list[runs.RankRun], expected: ReferenceRun, tolerance: float, what: str) -> float:
    """Losses on every rank, norms, every gradient of every step, and the weights at the end; returns the largest error."""
    for run in actual:
        assert run.losses == actual[0].losses, f"ranks disagree on the loss: {what}"
        assert run.grad_norms == actual[0].grad_norms, f"ranks disagree on the norm: {what}"
    errors = [
        _close(actual[0].losses, expected.losses, tolerance, f"losses, {what}"),
        _close(actual[0].grad_norms, expected.grad_norms, tolerance, f"norms, {what}"),
    ]
    for step, grads in enumerate(expected.grads):
        found = {**dict.fromkeys(grads), **assemble(run.grads[step] for run in actual)}
        errors.append(assert_close_by_name(found, grads, tolerance, f"gradients of step {step}, {what}"))
    weights = assemble(run.weights for run in actual)
    errors.append(assert_close_by_name(weights, expected.weights, tolerance, f"weights, {what}"))
    return max(errors)


def _close(actual: list[float], expected: list[float], tolerance: float, what: str) -> float:
    a, b = torch.tensor(actual, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64)
    assert a.shape == b.shape, f"{what}: {len(a)} values, not {len(b)}"
    error = ((a - b).abs() / b.abs().clamp(min=1e-30)).max().item()
    assert error < tolerance, f"{what}: {actual} is not {expected} (error {error:.1e})"
    return error

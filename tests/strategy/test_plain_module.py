# SPDX-License-Identifier: Apache-2.0
"""A LightningModule without MoE layers trains as under DDP: same hooks, counters, metrics, samples and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_moefold.lifecycle import data_order
from lightning_moefold.testing import RankPool, assert_close_by_name
from tests.quick import quick
from tests.strategy import plain_modules

CASES: list[tuple[bool, dict[str, Any]]] = [
    (False, {}),
    (False, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}),
    (True, {"accumulate_grad_batches": 2}),
    (True, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
]


def _same(actual: dict[str, Any], expected: dict[str, Any], what: str) -> None:
    assert actual["calls"] == expected["calls"], what
    assert len(expected["grads"]) == expected["step"] > 0, what
    assert len(expected["logged"]) == expected["epoch"] > 0, what
    for key in ("seen", "step", "epoch", "batches"):
        assert actual[key] == expected[key], f"{key}, {what}"
    assert [set(m) for m in actual["logged"]] == [set(m) for m in expected["logged"]], what
    for ours, theirs in zip(actual["logged"], expected["logged"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-10), what
    assert_close_by_name(actual["start"], expected["start"], 0.0, f"initial weights, {what}")
    for step, (ours, theirs) in enumerate(zip(actual["grads"], expected["grads"], strict=True)):
        # DDP gives zeros to a parameter that no rank has reached; a missing gradient says the same.
        theirs = {n: None if g is not None and ours[n] is None and not g.any() else g for n, g in theirs.items()}
        assert_close_by_name(ours, theirs, 1e-12, f"gradients of step {step}, {what}")
    assert_close_by_name(actual["weights"], expected["weights"], 1e-11, f"weights, {what}")


def test_two_data_ranks_like_ddp(pool: RankPool) -> None:
    for rank, pairs in enumerate(pool.run(plain_modules.fit_both, "", CASES, ranks=2)):
        for case, (ddp, ours) in zip(CASES, pairs, strict=True):
            _same(ours, ddp, f"rank {rank}, {case}")


def test_two_backward_passes_by_hand(pool: RankPool) -> None:
    """Gradients of an earlier backward are sums already, and are not summed again."""
    for ddp, ours in pool.run(plain_modules.by_hand, "", ranks=2):
        assert_close_by_name(ours, ddp, 1e-11, "weights")


@pytest.mark.parametrize("ranks", quick([2, 4], 4))
@pytest.mark.more
def test_tensor_parallel_ranks_are_one_data_rank(pool: RankPool, ranks: int) -> None:
    """Under tp2, two ranks read the same samples and compute the same gradients, which are never summed over them."""
    expected = pool.run(plain_modules.fit_cases, None, CASES, ranks=ranks // 2)
    actual = pool.run(plain_modules.fit_cases, "tp2", CASES, ranks=ranks)
    for rank, runs in enumerate(actual):
        for case, ours, ddp in zip(CASES, runs, expected[rank // 2], strict=True):
            _same(ours, ddp, f"rank {rank}, {case}")
    for a, b in zip(actual[0], actual[1], strict=True):
        assert a["seen"] == b["seen"]
        for ours, theirs in zip(a["grads"], b["grads"], strict=True):
            assert_close_by_name(ours, theirs, 0.0, "gradients of tp peers")


@pytest.mark.parametrize(("workers", "seed"), quick([(1, True), (0, False), (1, False)], (0, False)))
@pytest.mark.more
def test_tensor_parallel_ranks_draw_alike(pool: RankPool, workers: int, seed: bool) -> None:
    """Augmentations in workers and dropout are the same on the ranks of a data replica, and differ between replicas."""
    draws = pool.run(plain_modules.draw, "tp2", workers, seed, ranks=4)
    assert [dp for dp, _ in draws] == [0, 0, 1, 1]
    assert torch.equal(draws[0][1], draws[1][1])
    assert torch.equal(draws[2][1], draws[3][1])
    assert not torch.equal(draws[0][1][:, [1, 5]], draws[2][1][:, [1, 5]])


@pytest.mark.more
def test_checkpoint_is_a_plain_file(pool: RankPool, tmp_path: Path) -> None:
    """It loads with ``load_from_checkpoint`` and resumes under DDP, as DDP's resumes here."""
    folds: dict[str, str | None] = {"ours": "", "ddp": None}
    for name, fold in folds.items():
        pool.run(plain_modules.fit, fold, False, {"gradient_clip_val": 0.5}, str(tmp_path / name), ranks=2)
    ours, ddp = tmp_path / "ours" / "epoch=0.ckpt", tmp_path / "ddp" / "epoch=0.ckpt"
    assert ours.is_file()
    a, b = plain_modules.contents(str(ours)), plain_modules.contents(str(ddp))
    assert set(a) == {*b, data_order.ORDER}
    assert_close_by_name(a["state_dict"], b["state_dict"], 1e-12, "saved weights")
    weights = pool.run(plain_modules.fit, "", False, {"gradient_clip_val": 0.5}, ranks=2)[0]["weights"]
    # DDP reads weights before it makes them double, and loses digits.
    for fold, path, tolerance in (("", ours, 1e-12), ("", ddp, 1e-12), (None, ours, 1e-6)):
        resumed, _ = pool.run(plain_modules.resume_plain, fold, str(path), 2, ranks=2)
        assert_close_by_name(resumed, weights, tolerance, f"{fold!r} from {path}")
    pool.run(_load, str(ours), ranks=1)


def _load(path: str) -> None:
    module = plain_modules.Classifier.load_from_checkpoint(path)
    assert_close_by_name(module.state_dict(), plain_modules.contents(path)["state_dict"], 1e-7, "load_from_checkpoint")

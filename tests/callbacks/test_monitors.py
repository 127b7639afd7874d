# SPDX-License-Identifier: Apache-2.0
"""Monitors in real runs: the same figures on every rank and under every fold, and how little they communicate."""

from __future__ import annotations

import csv
import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_moefold import MoEConfig, comm
from lightning_moefold.balance.fast import ExpertCopies
from lightning_moefold.callbacks.balance_statistics import rank_imbalance
from lightning_moefold.plots.files import NO_EXPERT
from lightning_moefold.testing import RankPool, hf_reference, join_rows, make_batches, make_checkpoint
from tests.balance import plans
from tests.callbacks.jobs_custom_network import own_network_counts, own_network_fit, uneven_table
from tests.callbacks.jobs_monitors import Seen, monitored_fit
from tests.quick import quick

FOLDS = [("", 1), ("tp2 | ep2", 2), ("tp2 | ep4", 4), ("tp2 | ep2", 4), ("| etp2 ep2", 4), ("cp2 pp2 | ep2", 4)]
MODEL = {"num_experts": 8, "num_hidden_layers": 3}
FROZEN = {"lr": 0.0, "optimizer": "sgd"}  # so that one set of weights routes every batch
LENGTH, PARTS = 10, 4
TIME_KEYS = {"train/tokens_per_second", "train/tokens_per_second_per_device", "train/tflops_per_device", "train/mfu"}
NORM_KEYS = ["train/grad_norm", "train/grad_norm_dense", "train/grad_norm_expert"]
LOAD_KEYS = {
    "moe/load_imbalance", "moe/load_imbalance_max", "moe/cv_mean", "moe/cv_median", "moe/cv_min", "moe/cv_max",
    "moe/dead_expert_frac_mean", "moe/entropy_mean", "moe/expert_utilization_min", "moe/expert_utilization_p25",
    "moe/expert_utilization_median", "moe/expert_utilization_p75", "moe/expert_utilization_max",
    "moe/expert_diversity_mean", "moe/expert_diversity_min", "moe/dropped_frac",
    "moe/rank_load_max_over_mean", "moe/layer_0/max_over_mean", "moe/layer_2/cv", "moe/layer_2/dead_expert_frac",
    "moe/layer_0/entropy",
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # its layer in the middle is dense: rows of the table are not layer numbers
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), "qwen3_moe", **MODEL)


def batches(num: int = 4, padding: Any = "right") -> list[list[dict[str, torch.Tensor]]]:
    return make_batches(num, PARTS, 1 if padding == "none" else 2, LENGTH, 96, padding=padding)


@functools.cache
def hf_model(checkpoint: Path) -> Any:
    return hf_reference(checkpoint)


def hf_counts(checkpoint: Path, batch: dict[str, torch.Tensor]) -> np.ndarray:
    """How often Hugging Face's model chooses each expert for tokens that are no padding, ``[layers, experts]``."""
    model = hf_model(checkpoint)
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool().flatten()
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        logits_by_layer = model(**inputs, output_router_logits=True, use_cache=False).router_logits
    chosen = [logits[real].topk(model.config.num_experts_per_tok).indices for logits in logits_by_layer]
    return np.stack([torch.bincount(index.flatten(), minlength=8).numpy() for index in chosen])


def run(pool: RankPool, checkpoint: Path, root: Path, fold: str, ranks: int, data: Any, **spec: Any) -> list[Seen]:
    stages = {"strategy": {"num_microbatches": 2}} if "pp" in fold else {}
    spec = {"root": str(root), **FROZEN, **stages, **spec}
    return pool.run(monitored_fit, str(checkpoint), fold, data, spec, ranks=ranks)


def assert_equal_on_ranks(seen: list[Seen]) -> None:
    for other in seen[1:]:
        assert other.mfu == seen[0].mfu
        assert other.load == seen[0].load
        assert {k: v for k, v in other.logged.items() if k != "epoch"} == seen[0].logged


# ---- load ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fold", "ranks"), quick(FOLDS, ("cp2 pp2 | ep2", 4)))
def test_counts_are_those_of_one_process(
    pool: RankPool, checkpoint: Path, tmp_path: Path, fold: str, ranks: int
) -> None:
    data = batches()
    seen = run(pool, checkpoint, tmp_path, fold, ranks, data, log_every=2, csv=str(tmp_path))
    expected = [sum(hf_counts(checkpoint, join_rows(step)) for step in data[i : i + 2]) for i in (0, 2)]
    assert [step for step, _ in seen[0].history] == [2, 4]
    for (_, counts), wanted in zip(seen[0].history, expected, strict=True):
        np.testing.assert_array_equal(counts, wanted)
    assert all(not other.history for other in seen[1:])
    # The counters run on, for whoever else reads them.
    assert sum(rank.left for rank in seen) == sum(counts[counts > 0].sum() for _, counts in seen[0].history)
    assert_equal_on_ranks(seen)
    assert seen[0].load[0].keys() >= LOAD_KEYS
    assert not any(name.startswith("moe/layer_1/") for name in seen[0].load[0])
    saved = np.load(tmp_path / "expert_load.npz")
    assert saved["steps"].tolist() == [2, 4]
    assert saved["layers"].tolist() == [0, 2]
    np.testing.assert_array_equal(saved["counts"], expected)


@pytest.mark.parametrize(
    ("fold", "ranks"),
    quick([("tp2 | ep2", 2), ("tp2 | ep2", 4), ("| etp2 ep2", 4), ("| ep4", 4)], ("| etp2 ep2", 4)),
)
def test_load_of_ranks_is_what_their_experts_computed(
    pool: RankPool, checkpoint: Path, tmp_path: Path, fold: str, ranks: int
) -> None:
    seen = run(pool, checkpoint, tmp_path, fold, ranks, batches(2, padding="none"), log_every=2)
    rows_LR = np.array([rank.expert_rows for rank in seen]).T  # etp ranks compute the same rows: it changes no ratio
    assert rows_LR.shape[0] == 2
    assert seen[0].load[-1]["moe/rank_load_max_over_mean"] == pytest.approx(rank_imbalance(rows_LR), rel=1e-12)


@pytest.mark.more
@pytest.mark.parametrize("fold", ["| etp2 ep2", "| ep2"])
def test_load_of_ranks_with_copies(pool: RankPool, checkpoint: Path, tmp_path: Path, fold: str) -> None:
    """Two replicas of the experts, or two ranks that hold parts of each, plan their own copies."""
    copies = {"expert_copies": ExpertCopies(plans.drawn, 2)}
    seen = run(pool, checkpoint, tmp_path, fold, 4, batches(2, padding="none"), log_every=2, strategy=copies)
    rows_LR = np.array([rank.expert_rows for rank in seen]).T
    assert seen[0].load[-1]["moe/rank_load_max_over_mean"] == pytest.approx(rank_imbalance(rows_LR), rel=1e-12)


# ---- networks of the user's own --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fold", "ranks"),
    quick(
        [("", 1), ("", 2), (None, 2), ("tp2 | ep2", 2), ("tp2 | ep2", 4), ("| etp2 ep2", 4), ("tp4", 4)],
        (None, 2),
        ("tp2 | ep2", 4),
    ),  # fmt: skip
)
@pytest.mark.more
def test_a_network_of_the_users_own(pool: RankPool, tmp_path: Path, fold: str | None, ranks: int) -> None:
    """Counts of all ranks' rows, under every fold and DDP (None), with layers that differ in their experts."""
    rows = torch.randn(3, 4, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)  # tp leaves padding
    seen = pool.run(own_network_fit, fold, rows, str(tmp_path), ranks=ranks)
    wanted = own_network_counts(rows)
    for rank in seen:
        assert [step for step, _ in rank.history] == ([3] if rank is seen[0] else [])
        assert rank.load == seen[0].load
        assert rank.stored_range == (min(r.stored for r in seen), max(r.stored for r in seen))
    np.testing.assert_array_equal(seen[0].history[0][1], wanted)
    assert seen[0].load[0]["moe/layer_1/max_over_mean"] == pytest.approx(wanted[1, :2].max() / wanted[1, :2].mean())


def test_ranks_with_other_layers(pool: RankPool) -> None:
    """As on pipeline stages: each rank holds some layers, two hold one in common, and all get the whole table."""
    holds = [["blocks.10", "blocks.2"], ["blocks.1"], ["head", "blocks.2"]]
    found = pool.run(uneven_table, holds, ranks=3)
    order = ["blocks.1", "blocks.2", "blocks.10", "head"]
    for held, (names, numbers, counts, dropped) in zip(holds, found, strict=True):
        assert names == [name if name in held else "" for name in order]
        assert numbers == [0, 1, 2, 3]
        assert counts == [[2, 2, NO_EXPERT], [4, 4, 4], [1, 1, NO_EXPERT], [3, 3, NO_EXPERT]]
        assert dropped == [2, 4, 1, 3]


# ---- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fold", "ranks"), quick(FOLDS, ("tp2 | ep2", 4)))
@pytest.mark.more
def test_tokens_are_counted_once_per_data_rank(
    pool: RankPool, checkpoint: Path, tmp_path: Path, fold: str, ranks: int
) -> None:
    """One second per batch of fake time: the same global batch gives the same tokens per second under every fold."""
    seen = run(pool, checkpoint, tmp_path, fold, ranks, batches(3, padding="none"), clip=1.0)
    flops = 3 * MoEConfig.from_pretrained(checkpoint).forward_flops_per_token(LENGTH) * PARTS * LENGTH
    warmup, *steps = seen[0].mfu
    assert set(warmup) == set(NORM_KEYS)
    for figures in steps:
        assert figures["train/step_time"] == 1
        assert figures["train/tokens_per_second"] == PARTS * LENGTH
        assert figures["train/tokens_per_second_per_device"] == PARTS * LENGTH / ranks
        assert figures["train/tflops_per_device"] == pytest.approx(flops / ranks / 1e12)
        assert figures["train/mfu"] == pytest.approx(flops / (ranks * 1e9))
        assert 0.05 < figures["train/memory_peak_gb"] < 100
        total, *families = (figures[name] for name in NORM_KEYS)
        assert total == pytest.approx(math.hypot(*families))
        assert min(families) > 0
    if ranks > 1:
        [alone] = run(pool, checkpoint, tmp_path, "", 1, batches(3, padding="none"), clip=1.0)
        for name in NORM_KEYS:
            assert steps[-1][name] == pytest.approx(alone.mfu[-1][name], rel=1e-9)
    assert_equal_on_ranks(seen)


@pytest.mark.parametrize(("fold", "ranks"), quick([("", 1), ("tp2 | ep2", 4)], ("", 1)))
def test_products_that_frozen_experts_spare(
    pool: RankPool, checkpoint: Path, tmp_path: Path, fold: str, ranks: int
) -> None:
    """Frozen experts spare one of their three products, of the model and of the hardware."""
    data, config = batches(2, padding="none"), MoEConfig.from_pretrained(checkpoint)
    seen = run(pool, checkpoint, tmp_path, fold, ranks, data, frozen=["*.mlp.experts.*"])
    weights = config.num_moe_layers * config.num_experts_per_tok * 3 * config.hidden_size * config.moe_intermediate_size
    spared = 2 * weights * PARTS * LENGTH / (ranks * 1e9)
    figures, whole = seen[0].mfu[-1], run(pool, checkpoint, tmp_path, fold, ranks, data)[0].mfu[-1]
    assert figures["train/mfu"] == pytest.approx(whole["train/mfu"] - spared)
    assert "train/hfu" not in figures | whole


@pytest.mark.more
def test_recomputed_products_are_work_of_the_hardware(pool: RankPool, checkpoint: Path, tmp_path: Path) -> None:
    """Layers that keep nothing make all their products a fourth time; the head does not."""
    data, config = batches(2, padding="none"), MoEConfig.from_pretrained(checkpoint)
    figures = run(pool, checkpoint, tmp_path, "tp2 | ep2", 4, data, strategy={"recompute": "full"})[0].mfu[-1]
    layers = config.forward_flops_per_token(LENGTH) - 2 * config.vocab_size * config.hidden_size
    assert figures["train/hfu"] - figures["train/mfu"] == pytest.approx(layers * PARTS * LENGTH / 4e9)


@pytest.mark.more
def test_what_other_pipeline_stages_have_frozen(pool: RankPool, checkpoint: Path, tmp_path: Path) -> None:
    """FLOPs are those of one process, though no rank holds all parameters; unfreezing is found out."""
    spec = {"frozen": ["*.mlp.experts.*", "*embed_tokens*"], "unfreezes_in": 3}
    [alone] = run(pool, checkpoint, tmp_path, "", 1, batches(5, padding="none"), mfu={"window": 1}, **spec)
    seen = run(pool, checkpoint, tmp_path, "pp2", 2, batches(5, padding="none"), mfu={"window": 1}, **spec)
    assert_equal_on_ranks(seen)
    expected, found = (
        [figures["train/mfu"] / of.mfu[-1]["train/mfu"] for figures in of.mfu] for of in (alone, seen[0])
    )
    assert found == pytest.approx(expected)
    assert expected[0] == expected[1] < 1
    assert expected[2:] == [1, 1]


@pytest.mark.parametrize(
    ("count_padding", "expected"), quick([(True, PARTS * 2 * LENGTH), (False, None)], (False, None))
)
@pytest.mark.more
def test_padding_is_no_token(
    pool: RankPool, checkpoint: Path, tmp_path: Path, count_padding: bool, expected: int | None
) -> None:
    data = batches(2)
    seen = run(pool, checkpoint, tmp_path, "tp2 | ep2", 4, data, mfu={"count_padding": count_padding})
    real = int(join_rows(data[1])["attention_mask"].sum())
    assert real < PARTS * 2 * LENGTH
    assert seen[0].mfu[-1]["train/tokens_per_second"] == (expected or real)


@pytest.mark.more
def test_accumulation_counts_optimizer_steps(pool: RankPool, checkpoint: Path, tmp_path: Path) -> None:
    """Five batches by two make steps of 2, 2 and 1 batches; the window leaves out the first."""
    data = batches(5, padding="none")
    seen = run(pool, checkpoint, tmp_path, "| ep2", 2, data, accumulate=2)
    times = [figures["train/step_time"] for figures in seen[0].mfu]
    assert times == [2, 1.5]
    assert all(figures["train/tokens_per_second"] == PARTS * LENGTH for figures in seen[0].mfu)
    assert [(step, counts.sum()) for step, counts in seen[0].history] == [
        (step, num * PARTS * LENGTH * 2 * 2) for step, num in ((1, 2), (2, 2), (3, 1))
    ]


@pytest.mark.parametrize(
    "spec",
    quick(
        [
            {},  # the end of an epoch alone
            {"validate": True},
            {"save": True},
            {"save": True, "saving": {"save_weights_only": True}},
            {"save": True, "saving": {"save_weights_only": True}, "validate": True},
            {"save_by_hand": True},
        ],
        {"save": True, "saving": {"save_weights_only": True}, "validate": True},
    ),
    ids=["epoch", "validate", "save", "weights", "weights-validate", "by-hand"],
)
@pytest.mark.more
def test_validation_saves_and_epoch_ends_take_no_time(
    pool: RankPool, checkpoint: Path, tmp_path: Path, spec: dict[str, Any]
) -> None:
    folders = {name: str(tmp_path / name) for name in ("save", "save_by_hand") if name in spec}
    seen = run(pool, checkpoint, tmp_path, "tp2 | ep2", 2, batches(2, padding="none"), epochs=2, **(spec | folders))
    assert [figures["train/step_time"] for figures in seen[0].mfu] == [1, 1, 1]  # the first of four steps is warm-up


@pytest.mark.more
def test_fit_twice_and_a_schedule_of_its_own(pool: RankPool, checkpoint: Path, tmp_path: Path) -> None:
    own = {"log_every_n_steps": 2}
    spec = {
        "fits": 2,
        "log_every": 50,
        "csv": str(tmp_path),
        "mfu": {**own, "warmup_steps": 0, "window": 1},
        "load": own,
    }
    data = batches(3)
    seen = run(pool, checkpoint, tmp_path, "tp2 | ep4", 4, data, **spec)
    # the second fit starts at step 3, with counters reset
    assert [step for step, _ in seen[0].history] == [2, 4, 6]
    expected = [hf_counts(checkpoint, join_rows(step)) for step in data]
    wanted = [expected[0] + expected[1], expected[0], expected[1] + expected[2]]
    np.testing.assert_array_equal(np.stack([counts for _, counts in seen[0].history]), wanted)
    assert [figures["train/step_time"] for figures in seen[0].mfu] == [1, 1, 1]
    assert np.load(tmp_path / "expert_load.npz")["steps"].tolist() == [2, 4, 6]


@pytest.mark.more
def test_measured_peak_is_summed_over_ranks(pool: RankPool, checkpoint: Path, tmp_path: Path) -> None:
    seen = run(pool, checkpoint, tmp_path, "tp2 | ep2", 2, batches(2), mfu={"peak_flops": None})
    assert not list(tmp_path.rglob("expert_load.npz"))  # nobody logs, so nothing is written
    assert seen[0].peak == seen[1].peak
    assert 1e8 < seen[0].peak < 1e14
    assert run(pool, checkpoint, tmp_path, "tp2 | ep2", 2, batches(2))[0].peak == 2e9


# ---- communication ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fold", "ranks"), quick([("tp2 | ep2", 4), ("| etp2 ep2", 4), ("| ep2", 2), ("pp2", 2)], ("tp2 | ep2", 4))
)
def test_one_collective_per_log_step(pool: RankPool, checkpoint: Path, tmp_path: Path, fold: str, ranks: int) -> None:
    at_start = {"MFUMonitor.on_train_start:all_gather_object": 1} if "pp" in fold else {}  # what stages have frozen
    for rank in run(pool, checkpoint, tmp_path, fold, ranks, batches(6), log_every=3, accumulate=1):
        assert rank.collectives == {
            **at_start,
            "MFUMonitor.on_train_start:all_reduce": 1,
            f"MFUMonitor.on_train_batch_end:{comm.ALL_GATHER}": 2,
            "LoadBalanceMonitor.on_train_start:all_gather_object": 1,  # who has which layers
            "LoadBalanceMonitor.on_train_batch_end:all_reduce": 2,
        }


# ---- loggers ---------------------------------------------------------------------------------------------------------


def test_csv_holds_every_key(pool: RankPool, checkpoint: Path, tmp_path: Path) -> None:
    seen = run(pool, checkpoint, tmp_path, "tp2 | ep2", 2, batches(4), csv=str(tmp_path), log_every=2, clip=1.0)
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [1, 3]
    keys = {"train/step_time", "train/memory_peak_gb", *NORM_KEYS, *TIME_KEYS, *LOAD_KEYS}
    for row, mfu, load in zip(rows, seen[0].mfu, seen[0].load, strict=True):
        assert row.keys() >= keys
        for name in keys:
            assert float(row[name]) == pytest.approx((mfu | load)[name])
    assert (tmp_path / "expert_load.npz").is_file()


def test_wandb_offline(pool: RankPool, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run(pool, checkpoint, tmp_path, "| ep2", 2, batches(2), wandb=str(tmp_path), load={"heatmap": True}, summary=True)
    files = list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 1
    written = files[0].read_bytes()
    for name in ("train/mfu", "moe/load_imbalance", "moe/layer_2/cv", "moe/load_histogram", "moe/load_heatmap"):
        assert name.encode() in written, name
    for name in ("trainable_parameters", "tp1 cp1 dp2 pp1 | etp1 ep2 edp1"):  # the configuration
        assert name.encode() in written, name
    [media] = tmp_path.glob("wandb/offline-run-*/files/media")
    assert list(media.glob("images/moe/load_heatmap*.png"))
    table = json.loads(next(media.glob("table/fold*.table.json")).read_text())
    assert table["columns"][:2] == ["parameters", "total"]
    assert {"experts", "router", "total"} <= {row[0] for row in table["data"]}


# ---- summary ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fold", "ranks"), quick([("", 1), ("tp2 | ep2", 4), ("| etp2 ep2", 4), ("pp2 | ep2", 4)], ("pp2 | ep2", 4))
)
@pytest.mark.more
def test_summary_knows_what_ranks_store(
    pool: RankPool, checkpoint: Path, tmp_path: Path, fold: str, ranks: int
) -> None:
    spec = {"optimizer": "adamw", "frozen": ["*embed_tokens*"], "summary": True}
    if "pp" in fold:
        spec["strategy"] = {"num_microbatches": 2}
    seen = run(pool, checkpoint, tmp_path, fold, ranks, batches(1), **spec)
    stored = [rank.stored for rank in seen]
    assert all(rank.stored_range == (min(stored), max(stored)) for rank in seen)
    whole = MoEConfig.from_pretrained(checkpoint).num_parameters()
    assert all(rank.total == whole for rank in seen)  # of all stages, on each of them
    for index, name in enumerate(("weights", "gradients", "Adam states")):
        kept = [rank.kept[index] for rank in seen]
        assert all(rank.kept_range[name] == (min(kept), max(kept)) for rank in seen), name

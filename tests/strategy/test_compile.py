# SPDX-License-Identifier: Apache-2.0
"""``MoEFoldStrategy(compile=True)``: the bits of a run without it, and a plain sentence where it cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_moefold import MoEFoldStrategy
from lightning_moefold.parallel.compiling import missing_tool
from lightning_moefold.testing import RankPool, make_batches, make_checkpoint
from tests.quick import quick
from tests.strategy import jobs_compile

SPEC = {
    "precision": "bf16-mixed",
    "dispatch": {"expert_kernel": "grouped_mm"},
    "overrides": {"output_router_logits": True},
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "qwen"
    return str(make_checkpoint(folder, "qwen2_moe", num_experts=4, num_hidden_layers=2))


def _assert_same(plain: dict, ours: dict) -> None:
    assert plain["run"].losses == ours["run"].losses
    for theirs, grads in zip(plain["run"].grads, ours["run"].grads, strict=True):
        assert theirs.keys() == grads.keys()  # no name has changed
        for name, piece in grads.items():
            assert all(map(torch.equal, piece[2], theirs[name][2])), name
    assert plain["run"].weights.keys() == ours["run"].weights.keys()
    assert plain["graphs"] == plain["breaks"] == 0


@pytest.mark.parametrize("recompute", quick([None, pytest.param("full", marks=pytest.mark.slow)]))
def test_a_fold_keeps_its_bits(pool: RankPool, path: str, recompute: str | None) -> None:
    """Different data and different loads in each step: graphs break at collectives, and no step makes new ones."""
    batches = {dp: make_batches(3, dp, 4, 16, 96) for dp in (1, 2)}
    folds = ["tp1 | ep2", "tp2 | etp2"]
    for ranks in pool.run(jobs_compile.beside, path, folds, batches, {**SPEC, "recompute": recompute}, ranks=2):
        for fold, (plain, ours) in zip(folds, ranks, strict=True):
            _assert_same(plain, ours)
            assert ours["graphs"] > 0, fold
            assert ours["breaks"] > 0, fold
            [said] = ours["said"]
            assert "collectives" in said
            assert "FSDP2" in said
            assert "grouped_mm" not in said  # it computes in bfloat16


@pytest.mark.more
def test_a_pipeline_keeps_its_bits(pool: RankPool, path: str) -> None:
    for ranks in pool.run(jobs_compile.beside, path, ["pp2"], {1: make_batches(2, 1, 4, 16, 96)}, SPEC, ranks=2):
        for plain, ours in ranks:
            _assert_same(plain, ours)
            assert ours["graphs"] > 0


def test_one_rank_is_one_graph(pool: RankPool, path: str) -> None:
    batches = {2: make_batches(2, 1, 4, 16, 96)}
    [[(plain, ours)]] = pool.run(jobs_compile.beside, path, [""], batches, {**SPEC, "precision": "bf16-true"}, ranks=1)
    _assert_same(plain, ours)
    assert ours["graphs"] == 1
    assert ours["breaks"] == 0
    assert ours["said"] == ["compile=True: 2 of 2 decoder layers of this rank are one graph each."]


@pytest.mark.more
def test_noise_of_many_layers(pool: RankPool, tmp_path: Path) -> None:
    """Each layer has a graph of its own, more than torch allows by itself."""
    path = make_checkpoint(tmp_path / "deep", "qwen2_moe", num_experts=4, num_hidden_layers=10)
    spec = {**SPEC, "precision": "bf16-true", "overrides": {"router": {"input_jitter": 0.1}}}
    [[(plain, ours)]] = pool.run(
        jobs_compile.beside, str(path), [""], {2: make_batches(1, 1, 2, 16, 96)}, spec, ranks=1
    )
    _assert_same(plain, ours)
    assert ours["graphs"] == 10
    assert ours["breaks"] == 0


def test_no_compiler_one_warning(pool: RankPool, path: str, tmp_path: Path) -> None:
    """The run goes on, not compiled."""
    [(said, graphs, losses)] = pool.run(
        jobs_compile.without_a_compiler, path, make_batches(1, 1, 2, 16, 96), str(tmp_path / "empty"), ranks=1
    )
    assert len(said) == 1
    assert "C++ compiler" in said[0]
    assert graphs == 0
    assert len(losses) == 1


def test_what_each_device_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "C++" in str(missing_tool(torch.device("cpu")))
    assert missing_tool(torch.device("cuda")) is not None
    compiler = tmp_path / "mycc"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert missing_tool(torch.device("cpu")) is None


@pytest.mark.parametrize("schedule", ["zbv", "dualpipev", "interleaved_zero_bubble"])
@pytest.mark.parametrize("option", [{"compile": True}, {"expert_kernel": "transformer_engine"}])
def test_schedules_that_split_backward_are_refused(schedule: str, option: dict[str, Any]) -> None:
    strategy = MoEFoldStrategy(
        fold="pp2", num_microbatches=4, pipeline_schedule=schedule, num_stages_per_rank=2, **option
    )
    with pytest.raises(ValueError, match=f"leave {next(iter(option))} out, or use 'interleaved_1f1b'"):
        strategy.settings.check_pipeline(2)

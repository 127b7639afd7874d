# SPDX-License-Identifier: Apache-2.0
"""What a pipeline refuses, and that no rank is left waiting when something is wrong on another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_moefold.parallel import PipelinePlan
from lightning_moefold.testing import RankPool, make_checkpoint, relative_error
from tests.strategy import jobs_pipeline


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "qwen"
    return str(make_checkpoint(folder, "qwen2_moe", num_experts=4, vocab_size=96, moe_intermediate_size=8))


def test_errors_reach_all_ranks(pool: RankPool, path: str) -> None:
    patterns = {
        "bad token": "lie outside the vocabulary of 96",
        "other batch on the last stage": "were given different batches",
        "other arguments on the last stage": "were given different batches or arguments",
        "loss_fn": "",
        "through logits": "only output.loss can be differentiated",
        "generate": "no error",
        "good again": "no error",
    }
    for rank, messages in enumerate(pool.run(jobs_pipeline.errors, path, ranks=4)):
        for name, pattern in patterns.items():
            assert pattern in messages[name], f"{name}: {messages[name]}"
        assert ("ZeroDivisionError" if rank >= 2 else "loss_fn failed on another rank") in messages["loss_fn"]


def test_weights_are_read_by_the_stage_that_holds_them(pool: RankPool, path: str) -> None:
    first, last = pool.run(jobs_pipeline.names_read, path, ranks=2)
    assert first & last == set()
    assert {"model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"} <= first
    assert {"model.norm.weight", "lm_head.weight", "model.layers.1.mlp.gate.weight"} <= last


def test_what_a_call_leaves_behind(pool: RankPool, path: str) -> None:
    """Gradients of earlier are put back, tokens are counted once, and every rank has the same loss and logits."""
    seen = pool.run(jobs_pipeline.a_call, path, ranks=2)
    for found in seen:
        assert found["grads_kept"]
        assert found["counts"] == [48 * 2]  # tokens times choices, of one layer a stage
        assert found["loss"] == seen[0]["loss"]
        assert found["logits"] == seen[0]["logits"]
    assert [found["own_logits"] for found in seen] == [None, [8, 6, 96]]


def test_forward_alone_through_every_kind_of_stages(pool: RankPool, tmp_path: Path) -> None:
    deep = str(make_checkpoint(tmp_path / "deep", "qwen2_moe", num_hidden_layers=4, vocab_size=96))
    plans = [PipelinePlan("gpipe"), PipelinePlan("interleaved_1f1b", 2), PipelinePlan("zbv")]
    [expected] = pool.run(jobs_pipeline.evaluations, deep, "", plans[:1], ranks=1)
    for seen in pool.run(jobs_pipeline.evaluations, deep, "pp2", plans, ranks=2):
        for (loss, logits), (right, whole) in zip(seen, expected * len(plans), strict=True):
            assert loss == pytest.approx(right, rel=1e-12)
            assert relative_error(logits, whole) < 1e-12


@pytest.mark.parametrize(("world", "fold"), [(2, "pp2"), pytest.param(4, "pp2 | ep2", marks=pytest.mark.slow)])
def test_inference_mode_leaves_nothing_behind(pool: RankPool, path: str, world: int, fold: str) -> None:
    for (loss, grads), (again, after) in pool.run(jobs_pipeline.after_inference_mode, path, fold, ranks=world):
        assert loss == again
        assert grads.keys() == after.keys()
        assert all(torch.equal(grads[name], after[name]) for name in grads)


def test_refusals(pool: RankPool, path: str, tmp_path: Path) -> None:
    tied = str(make_checkpoint(tmp_path / "tied", "mixtral", tie_word_embeddings=True, num_hidden_layers=4))
    for messages in pool.run(jobs_pipeline.refused, path, tied, ranks=2):
        assert "holds no MoECausalLM to cut into stages" in messages["plain module"]
        assert "a second name for a part of a model that another pipeline stage holds" in messages["second name"]
        assert "does not go with tied embeddings" in messages["tied"]
        assert "needs num_microbatches; '1f1b' runs with 2 or more" in messages["microbatches"]

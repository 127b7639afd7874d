# SPDX-License-Identifier: Apache-2.0
"""Scores of experts equal loops over tokens, under every fold; pruned checkpoints equal a model pruned by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lightning_moefold import MoECausalLM
from lightning_moefold.compression.expert_pruning import prune_experts, score_experts
from lightning_moefold.compression.scores import EXPERT_SCORES, experts_to_keep, register_expert_score
from lightning_moefold.errors import InputError
from lightning_moefold.testing import RankPool, hf_reference, make_checkpoint
from tests.compression.jobs_analysis import scores_under
from tests.compression.naive import blocks_of, calibration_rows, matrices, tokens_at
from tests.compression.test_analysis import EXACT
from tests.quick import quick

ROWS = calibration_rows()


@torch.no_grad()
def naive_scores(path: Path, score: str) -> dict[int, list[float]]:
    """Each score as its formula says."""
    model, found = hf_reference(path), {}
    for index, block in blocks_of(model).items():
        outputs: dict[int, list[Any]] = {e: [] for e in range(len(block.experts.down_proj))}
        for token in tokens_at(model, index, ROWS, normalised=True):
            for expert, weight in zip(token.experts, token.weights, strict=True):
                gate_FD, up_FD, down_DF = matrices(block, expert)
                output_D = down_DF @ (F.silu(gate_FD @ token.x_D) * (up_FD @ token.x_D))
                outputs[expert].append((weight, output_D))
        found[index] = [_score(score, seen) for seen in outputs.values()]
    return found


def _score(score: str, seen: list[Any]) -> float:
    if not seen:
        return 0.0
    norms = [output.norm().item() for _, output in seen]
    if score == "frequency":
        return len(seen)
    if score == "reap":
        return sum(weight * norm for (weight, _), norm in zip(seen, norms, strict=True)) / len(seen)
    if score == "ean":
        return sum(norms)
    if score == "man":
        return sum(norms) / len(seen)
    if score == "msan":
        return sum(norm**2 for norm in norms) / len(seen)
    mean_D = torch.stack([output for _, output in seen]).mean(0)
    spread = sum((output - mean_D).square().sum().item() for _, output in seen)
    return len(seen) * (spread / max(len(seen) - 1, 1)) ** 0.5


@pytest.mark.parametrize("family", quick(["mixtral", "qwen2_moe"], "qwen2_moe"))
def test_scores_are_those_of_a_loop_over_tokens(tmp_path: Path, family: str) -> None:
    path = make_checkpoint(tmp_path / "model", family)
    for score in ("frequency", "reap", "ean", "man", "msan", "mone"):
        found, expected = score_experts(path, ROWS, EXACT, score=score), naive_scores(path, score)
        assert found.keys() == expected.keys()
        for layer, score_E in found.items():
            np.testing.assert_allclose(score_E, expected[layer], rtol=1e-9, err_msg=score)


@pytest.mark.parametrize("score", quick(["reap", "mone", "frequency", "msan"], "reap"))
def test_scores_are_the_same_under_every_fold(pool: RankPool, tmp_path: Path, score: str) -> None:
    path = make_checkpoint(tmp_path / "model", "qwen2_moe")
    alone = score_experts(path, ROWS, EXACT, score=score)
    folds = ["| ep4", "| etp2 ep2", "tp2 cp2 | etp4", "pp2 | ep2", "tp2 |"]
    for found in pool.run(scores_under, folds, str(path), ROWS, score, ranks=4):
        for scores in found:
            for layer, score_E in alone.items():
                np.testing.assert_allclose(scores[layer], score_E, rtol=1e-9)


@pytest.mark.parametrize("family", quick(["mixtral", "qwen2_moe", "qwen3_moe"], "mixtral"))
def test_the_rest_of_the_experts_is_a_plain_checkpoint(tmp_path: Path, family: str) -> None:
    """Equal to the whole model whose router never chooses the others."""
    path = make_checkpoint(tmp_path / "model", family, num_experts=6)
    kept = prune_experts(path, score_experts(path, ROWS, EXACT), tmp_path / "out", 0.5)
    by_hand, model = hf_reference(path), hf_reference(tmp_path / "out")
    for index, block in blocks_of(by_hand).items():
        rows = torch.from_numpy(kept[index])
        block.gate.weight.data = block.gate.weight.data[rows]
        block.experts.gate_up_proj.data = block.experts.gate_up_proj.data[rows]
        block.experts.down_proj.data = block.experts.down_proj.data[rows]
        block.gate.num_experts = block.experts.num_experts = block.num_experts = 3
    with torch.no_grad():
        expected = by_hand(ROWS.token_NS).logits
        torch.testing.assert_close(model(ROWS.token_NS).logits, expected, rtol=0, atol=1e-12)
        ours = MoECausalLM.from_pretrained(tmp_path / "out", torch.float64, router_aux_loss_coef=0.0)
        torch.testing.assert_close(ours(ROWS.token_NS).logits, expected, rtol=0, atol=1e-10)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model", "mixtral")
    scores = {layer: np.arange(4.0) for layer in range(2)}
    with pytest.raises(InputError, match=r"--keep 0.25 leaves 1 of 4 experts, but a token needs 2; use 0.5 or more"):
        prune_experts(path, scores, tmp_path / "out", 0.25)
    with pytest.raises(InputError, match="--keep 0.99 keeps all 4"):
        prune_experts(path, scores, tmp_path / "out", 0.99)
    with pytest.raises(InputError, match="--keep nan must lie between 0 and 1"):
        prune_experts(path, scores, tmp_path / "out", float("nan"))
    with pytest.raises(InputError, match="--score luck is not known; use frequency, reap"):
        score_experts(path, ROWS, EXACT, score="luck")
    with pytest.raises(InputError, match="'reap' exists already"):
        register_expert_score("reap")(EXPERT_SCORES["reap"])


def test_of_equal_experts_the_later_stay() -> None:
    assert experts_to_keep(np.array([1.0, 1, 2, 1]), 2).tolist() == [2, 3]

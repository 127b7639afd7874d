# SPDX-License-Identifier: Apache-2.0
"""Precisions, and probes that name the ranks over which gradients were summed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from lightning_moefold import Fold, MoEConfig
from lightning_moefold.models.names import parameter_entries
from lightning_moefold.testing import RankPool, hf_reference, make_checkpoint, reference_run, routing_margin
from lightning_moefold.testing.compare import assert_close_by_name
from lightning_moefold.testing.pieces import assemble
from tests.strategy import finetune, precisions

#: dp_cp and edp of one and of several, in every way to store weights.
FOLDS = [
    ("", "optimizer"), ("tp4 | ep4", "full"), ("tp2 | ep2 etp2", "none"), ("| ep4", "full"), ("tp4", "none"),
    ("pp2 | ep2", "optimizer"), ("pp2 | etp2", "none"), ("tp2", "none"), ("", "none"),
]  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "qwen"
    return make_checkpoint(folder, "qwen2_moe", num_experts=4, vocab_size=96, moe_intermediate_size=8)


@pytest.fixture(scope="module")
def tokens(path: Path) -> torch.Tensor:
    """Rows without near-ties in the router, where rounding would choose other experts."""
    model = hf_reference(path)
    for seed in range(100):
        rows = finetune.rows(finetune.ROWS, seed)
        if routing_margin(model, {"input_ids": rows}) > 3e-3:
            return rows
    raise AssertionError("no rows without near-ties")


def test_single_precision(pool: RankPool, path: Path, tokens: torch.Tensor) -> None:
    batch = {"input_ids": tokens, "labels": tokens}
    expected = reference_run(
        path, [batch], dtype=torch.float32, config_overrides={"output_router_logits": True}, optimizer="sgd"
    )
    outcome = pool.run(precisions.train_folds, str(path), FOLDS, "32-true", tokens, ranks=4)
    for i, fold in enumerate(FOLDS):
        runs = [r[i] for r in outcome]
        assert len({r["losses"][0] for r in runs}) == 1
        assert runs[0]["losses"][0] == pytest.approx(expected.losses[0], rel=1e-6), fold
        assert_close_by_name(assemble(r["grads"] for r in runs), expected.grads[0], 1e-4, fold)
        assert runs[0]["seen"]["storage"] == "['torch.float32']"


@pytest.mark.parametrize("ranks", [1, 4])
def test_mixed_precision(pool: RankPool, path: Path, ranks: int) -> None:
    """Weights and gradients in float32, computation in bfloat16, the router in float32, autocast for others only."""
    tokens = finetune.rows(3 * finetune.ROWS)
    [[exact]] = pool.run(precisions.train_folds, str(path), FOLDS[:1], "32-true", tokens, ranks=1)
    folds = FOLDS if ranks == 4 else [("", "full"), ("", "none")]
    outcome = pool.run(precisions.train_folds, str(path), folds, "bf16-mixed", tokens, ranks=ranks)
    for i, fold in enumerate(folds):
        runs = [r[i] for r in outcome]
        for run in runs:
            assert run["losses"] == runs[0]["losses"], f"ranks disagree, {fold}"
            assert run["losses"] == pytest.approx(exact["losses"], rel=0.02), fold
            assert run["losses"] != exact["losses"]
            assert run["seen"] == {
                "own": "torch.bfloat16", "autocast": "True", "autocast inside": "False", "inside": "torch.bfloat16",
                "router": "torch.float32", "router weight": "torch.float32", "gradients": "['torch.float32']",
                "storage": "['torch.float32']",
            }, fold  # fmt: skip
        assemble(r["weights"] for r in runs)
        grads, expected = (assemble(r["grads"] for r in these) for these in (runs, [exact]))
        for name, wanted in expected.items():
            if wanted.norm() > 1e-3:  # a gradient summed over the wrong ranks would be off by a factor
                assert torch.cosine_similarity(grads[name].flatten(), wanted.flatten(), 0) > 0.9, f"{name}, {fold}"
                assert float(grads[name].norm() / wanted.norm()) == pytest.approx(1, abs=0.25), f"{name}, {fold}"


def test_brain_float(pool: RankPool, path: Path) -> None:
    tokens = finetune.rows(2 * finetune.ROWS)
    [[exact]] = pool.run(precisions.train_folds, str(path), FOLDS[:1], "32-true", tokens, ranks=1)
    outcome = pool.run(precisions.train_folds, str(path), FOLDS, "bf16-true", tokens, ranks=4)
    for i, fold in enumerate(FOLDS):
        for run in (r[i] for r in outcome):
            assert run["losses"] == outcome[0][i]["losses"], fold
            assert run["losses"] == pytest.approx(exact["losses"], rel=0.03), fold
            assert run["seen"]["storage"] == run["seen"]["gradients"] == "['torch.bfloat16']"
            assert run["seen"]["router"] == "torch.float32"
            assert run["seen"]["own"] == "torch.bfloat16"


def test_precisions_that_are_refused(pool: RankPool) -> None:
    [messages] = pool.run(precisions.refuse, ranks=1)
    for name, message in messages.items():
        assert message.startswith("ValueError"), message
        assert name.strip("'") in message
        assert "use one of '32-true', 'bf16-mixed', 'bf16-true', '64-true'" in message
        assert "\n" not in message


# ---- probes ----------------------------------------------------------------------------------------------------------


def _families(path: Path) -> dict[str, str]:
    """Dense weights that are cut over tp, those that are not, and experts."""
    cut = ("q_proj", "k_proj", "v_proj", "o_proj", "shared_expert.", "embed_tokens", "lm_head")
    names = parameter_entries(MoEConfig.from_pretrained(path))
    return {n: "expert" if ".experts." in n else "cut" if any(c in n for c in cut) else "partial" for n in names}


PROBED = ["tp2 | ep2", "tp2 | ep2 etp2", "| etp2", "tp4 | ep2", "tp4 | ep4", "", "| ep4", "tp2 | etp4"]


def test_two_to_the_rank(pool: RankPool, path: Path) -> None:
    """The sum of 2 ** rank names the ranks: dense over dp_cp, partial over tp as well, experts over edp."""
    outcome = pool.run(precisions.powers, str(path), PROBED, ranks=4)
    for i, text in enumerate(PROBED):
        fold = Fold.parse(text, 4)
        groups = {"cut": fold.groups("dp_cp"), "expert": fold.groups("edp"), "partial": [list(range(4))]}
        for rank in range(4):
            for name, family in _families(path).items():
                if name not in outcome[rank][i]:
                    continue  # this rank's piece is empty
                if fold.tp == 4 and ("k_proj" in name or "v_proj" in name):
                    family = "partial"  # two key/value heads are not cut over four ranks
                members = next(g for g in groups[family] if rank in g)
                value = int(outcome[rank][i][name])
                summed = [r for r in range(8) if value >> r & 1]
                assert summed == members, (
                    f"{name} ({family}) on rank {rank} of {fold}: summed over {summed}, not {members}"
                )
        assert set().union(*(outcome[r][i] for r in range(4))) == set(_families(path))


def test_all_ones(pool: RankPool, path: Path) -> None:
    """The norm of ones is the square root of the number of parameters, under every fold."""
    folds = [str(f) for f in Fold.enumerate(4, MoEConfig.from_pretrained(path)) if f.cp == 1]
    for results in pool.run(precisions.ones, str(path), folds, ranks=4, timeout=240):
        for fold, (norm, count) in zip(folds, results, strict=True):
            assert norm == pytest.approx(math.sqrt(count), rel=1e-12), fold


def test_number_of_collectives(pool: RankPool, path: Path) -> None:
    """More of them than this is a regression; fewer is progress, to be written down here."""
    counts = pool.run(precisions.collectives, str(path), "tp2 | ep2 etp2", ranks=4)
    assert counts[0] == counts[1] == counts[2] == counts[3]
    assert counts[0] == EXPECTED


#: Two MoE layers with shared expert, tp2 dp2 | etp2 ep2, AdamW, clipping.
EXPECTED = {"_allgather_base_": 16, "_reduce_scatter_base_": 13, "allreduce_": 3, "alltoall_base_": 16}


def test_accumulation_blocks_reductions(pool: RankPool, path: Path) -> None:
    for seen in pool.run(precisions.blocked, str(path), "| ep2", ranks=4):
        assert seen["flags"] == [[False], [True]]

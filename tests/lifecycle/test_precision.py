# SPDX-License-Identifier: Apache-2.0
"""Precisions, each against one process, and how many collectives a step takes."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision

from lightning_moefold.lifecycle.precision import MoEFoldPrecision
from lightning_moefold.testing import RankPool, hf_reference, make_checkpoint, reference_run, routing_margin
from lightning_moefold.testing.compare import assert_close_by_name
from lightning_moefold.testing.pieces import assemble
from tests.lifecycle import jobs_precision
from tests.strategy import finetune

#: dp_cp and edp of one and of several, in every way to store weights.
FOLDS = [
    ("", "optimizer"), ("tp4 | ep4", "full"), ("tp2 | ep2 etp2", "none"), ("| ep4", "full"), ("tp4", "none"),
    ("cp2 | ep4", "full"), ("cp2 pp2 | ep2", "optimizer"), ("pp2 | etp2", "none"), ("", "none"),
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


@pytest.fixture(scope="module")
def clear_rows(path: Path) -> torch.Tensor:
    """Of many rows, those in which the router hesitates least."""
    model = hf_reference(path)
    drawn = [finetune.rows(finetune.ROWS, seed) for seed in range(200)]
    drawn.sort(key=lambda rows: routing_margin(model, {"input_ids": rows}), reverse=True)
    assert routing_margin(model, {"input_ids": drawn[2]}) > 0.1
    return torch.cat(drawn[:3])


def test_what_lightnings_plugin_has_is_found() -> None:
    """As under other strategies, a module may ask ``trainer.precision_plugin`` for the device of autocast, or the scaler."""
    plugin = MoEFoldPrecision(MixedPrecision("bf16-mixed", "cpu"))
    for one in (plugin, copy.deepcopy(plugin), pickle.loads(pickle.dumps(plugin))):
        assert (one.device, one.scaler, one.precision) == ("cpu", None, "bf16-mixed")
    with pytest.raises(AttributeError, match="device"):
        _ = MoEFoldPrecision(Precision()).device


@pytest.mark.more
def test_single_precision(pool: RankPool, path: Path, tokens: torch.Tensor) -> None:
    batch = {"input_ids": tokens, "labels": tokens}
    expected = reference_run(
        path, [batch], dtype=torch.float32, config_overrides={"output_router_logits": True}, optimizer="sgd"
    )
    outcome = pool.run(jobs_precision.train_folds, str(path), FOLDS, "32-true", tokens, ranks=4)
    for i, fold in enumerate(FOLDS):
        runs = [r[i] for r in outcome]
        assert len({r["losses"][0] for r in runs}) == 1
        assert runs[0]["losses"][0] == pytest.approx(expected.losses[0], rel=1e-6), fold
        assert_close_by_name(assemble(r["grads"] for r in runs), expected.grads[0], 1e-4, fold)
        assert runs[0]["seen"]["storage"] == "['torch.float32']"


@pytest.mark.more
def test_mixed_precision(pool: RankPool, path: Path, clear_rows: torch.Tensor) -> None:
    """Weights and gradients in float32, computation in bfloat16, the router in float32, autocast for others only.

    A fold may be as far from one process as roundings of two kinds are from each other, and tp and etp round parts of sums
    besides: each tensor's gradient differs by no more than three times what bfloat16 itself costs there, and is within a
    fifth of float32's (2-norms). The rows are those in which no token is near to another expert: one that changes its
    expert would change a gradient by more than any rounding.
    """
    rows = clear_rows
    [[exact]] = pool.run(jobs_precision.train_folds, str(path), FOLDS[:1], "32-true", rows, ranks=1)
    [alone] = pool.run(
        jobs_precision.train_folds,
        str(path),
        [("", "optimizer"), ("", "full"), ("", "none")],
        "bf16-mixed",
        rows,
        ranks=1,
    )
    outcome = pool.run(jobs_precision.train_folds, str(path), FOLDS, "bf16-mixed", rows, ranks=4)
    in_full, narrow = assemble([exact["grads"]]), assemble([alone[0]["grads"]])
    for fold, runs in [
        *(("one process", [run]) for run in alone),
        *((f, [r[i] for r in outcome]) for i, f in enumerate(FOLDS)),
    ]:
        for run in runs:
            assert run["losses"] == runs[0]["losses"], f"ranks disagree, {fold}"
            assert run["losses"] == pytest.approx(exact["losses"], rel=0.02), fold
            assert run["losses"] != exact["losses"]
            assert run["seen"] == {
                "own": "torch.bfloat16", "autocast": "True", "autocast inside": "False", "inside": "torch.bfloat16",
                "router": "torch.float32", "router weight": "torch.float32", "gradients": "['torch.float32']",
                "storage": "['torch.float32']",
            }, fold  # fmt: skip
        grads = assemble(r["grads"] for r in runs)
        assert grads.keys() == in_full.keys()
        for name, grad in grads.items():
            wanted = in_full[name]
            cost, distance = (narrow[name] - wanted).norm(), (grad - narrow[name]).norm()
            assert distance <= 3 * cost, f"{name}, {fold}: {distance / cost:.1f} times what bfloat16 costs"
            assert (grad - wanted).norm() <= 0.2 * wanted.norm(), f"{name}, {fold}"
        assemble(r["weights"] for r in runs)


@pytest.mark.more
def test_brain_float(pool: RankPool, path: Path) -> None:
    tokens = finetune.rows(2 * finetune.ROWS)
    [[exact]] = pool.run(jobs_precision.train_folds, str(path), FOLDS[:1], "32-true", tokens, ranks=1)
    outcome = pool.run(jobs_precision.train_folds, str(path), FOLDS, "bf16-true", tokens, ranks=4)
    for i, fold in enumerate(FOLDS):
        for run in (r[i] for r in outcome):
            assert run["losses"] == outcome[0][i]["losses"], fold
            assert run["losses"] == pytest.approx(exact["losses"], rel=0.03), fold
            assert run["seen"]["storage"] == run["seen"]["gradients"] == "['torch.bfloat16']"
            assert run["seen"]["router"] == "torch.float32"
            assert run["seen"]["own"] == "torch.bfloat16"


def test_precisions_that_are_refused(pool: RankPool) -> None:
    [messages] = pool.run(jobs_precision.refuse, ranks=1)
    assert len(messages) >= 6
    for name, message in messages.items():
        assert message.startswith("InputError"), message
        assert name.strip("'") in message
        assert "use one of '32-true', 'bf16-mixed', 'bf16-true', '64-true'" in message
        assert "\n" not in message


def test_number_of_collectives(pool: RankPool, path: Path) -> None:
    """More of them than this is a regression; fewer is progress, to be written down here."""
    counts = pool.run(jobs_precision.collectives, str(path), "tp2 | ep2 etp2", ranks=4)
    assert counts[0] == counts[1] == counts[2] == counts[3]
    assert counts[0] == EXPECTED


#: Two MoE layers with shared expert, tp2 dp2 | etp2 ep2, AdamW, clipping. All-to-alls of a layer: over ep tokens and weights
#: there, results back, and the same in backward; over etp three gathers and reductions likewise. One of the sums is of integers
#: on the host, in which ranks say that they have the batch: the dataloader is one of the test's own.
EXPECTED = {"_allgather_base_": 16, "_reduce_scatter_base_": 13, "allreduce_": 4, "alltoall_base_": 24}


@pytest.mark.more
def test_accumulation_blocks_reductions(pool: RankPool, path: Path) -> None:
    for seen in pool.run(jobs_precision.blocked, str(path), "| ep2", ranks=4):
        assert seen["flags"] == [[False], [True]]

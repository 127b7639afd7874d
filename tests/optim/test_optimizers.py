# SPDX-License-Identifier: Apache-2.0
"""Resuming with any elementwise optimizer, several optimizers by hand, and optimizers that cannot be right."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_moefold.testing import RankPool, assert_close_by_name, make_checkpoint
from lightning_moefold.testing.pieces import assemble
from tests.optim import jobs_optimizers
from tests.quick import quick

NAMES = ["groups with schedules", "some parameters", "adagrad", "nadam", "lion foreach", "muon"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "qwen"
    return str(make_checkpoint(folder, "qwen2_moe", num_experts=4, vocab_size=96, moe_intermediate_size=8))


@pytest.mark.slow
def test_resume_under_another_fold(pool: RankPool, path: str, tmp_path: Path) -> None:
    full = pool.run(jobs_optimizers.interrupted, path, "| ep2", NAMES, str(tmp_path), 4, False, ranks=2)
    pool.run(jobs_optimizers.interrupted, path, "| ep2", NAMES, str(tmp_path), 2, False, ranks=2)
    actual = pool.run(jobs_optimizers.interrupted, path, "tp2 | ep2 etp2", NAMES, str(tmp_path), 4, True, ranks=4)
    for i, name in enumerate(NAMES):
        assert actual[0][i].losses == pytest.approx(full[0][i].losses[2:], rel=1e-9), name
        for part in ("weights", "state"):
            found = assemble(getattr(reports[i], part) for reports in actual)
            expected = assemble(getattr(reports[i], part) for reports in full)
            assert_close_by_name(found, expected, 1e-9, f"{part} of {name}")


@pytest.mark.slow
def test_two_optimizers_by_hand(pool: RankPool, path: str, tmp_path: Path) -> None:
    [(losses, weights)] = pool.run(jobs_optimizers.by_hand, path, "", str(tmp_path), "none", False, ranks=1)
    for fold, sharding, resume in (("tp2 | ep2", "optimizer", True), ("", "full", False)):
        actual = pool.run(jobs_optimizers.by_hand, path, fold, str(tmp_path), sharding, resume, ranks=4)
        for found, _ in actual:
            assert found == pytest.approx(losses[-len(found) :], rel=1e-9)
        assert_close_by_name(assemble(w for _, w in actual), assemble([weights]), 1e-9, f"{fold!r}, {sharding}")


HOW = ["norm", "foreach norm", "mean", "product", "decomposition"]
KINDS = [
    "SOAP", "DistributedShampoo", "Lamb", "FusedLAMB", "LARS", "GaLoreAdamW", "MuonWithAuxAdam", "APOLLOAdamW",
    "AdamW8bit", "AdamW4bit", "AdamWFp8", "ZeroRedundancyOptimizer", "CPUOffloadOptimizer", "Rprop", "Muon",
]  # fmt: skip


@pytest.mark.parametrize("fold", quick(["", "tp2 | etp2"], "tp2 | etp2"))
@pytest.mark.more
def test_optimizers_that_combine_elements(pool: RankPool, path: str, fold: str) -> None:
    """Known ones by their name, before training; unknown ones by what they do, before their first step has an effect."""
    specs = [{"kind": "Stranger", "how": how} for how in HOW] + [{"kind": kind} for kind in KINDS]
    for messages in pool.run(jobs_optimizers.unfit, path, fold, [*specs, {"kind": "Harmless"}], ranks=2):
        assert messages.pop() == "no error"
        for spec, message in zip(specs, messages, strict=True):
            assert message.startswith(f"UnsupportedFeature: {spec['kind']} "), message
            assert "\n" not in message
            assert ("combines the elements" in message) == ("how" in spec), message


def test_one_rank_holds_whole_parameters(pool: RankPool, path: str) -> None:
    assert pool.run(jobs_optimizers.unfit, path, "", [{"kind": "Stranger", "how": "norm"}], ranks=1) == [["no error"]]

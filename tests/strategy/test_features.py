# SPDX-License-Identifier: Apache-2.0
"""Lightning feature by feature: it computes under a fold what it computes in one process, or it is refused in a sentence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lightning_moefold.testing import RankPool, assert_close_by_name, make_checkpoint
from lightning_moefold.testing.pieces import assemble
from tests.strategy import jobs_features
from tests.strategy.test_bad_input import sentence

FOLD = "tp2 | ep2 etp2"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "qwen"
    return str(make_checkpoint(folder, "qwen3_moe", num_experts=4, num_hidden_layers=2))


@pytest.mark.more
def test_features_that_work(pool: RankPool, path: str, tmp_path: Path) -> None:
    [expected] = pool.run(jobs_features.working, path, "", str(tmp_path / "1"), ranks=1)
    actual = pool.run(jobs_features.working, path, FOLD, str(tmp_path / "4"), ranks=4)
    assert set(expected) == set(jobs_features.WORKING)
    for name, theirs in expected.items():
        assert theirs.losses, name
        for ours in (reports[name] for reports in actual):
            assert ours.losses == pytest.approx(theirs.losses, rel=1e-8), name
            assert ours.validation == pytest.approx(theirs.validation, rel=1e-8), name
            assert ours.counters == theirs.counters, name
            assert ours.metrics == pytest.approx(theirs.metrics, rel=1e-6), name
        weights = assemble(reports[name].weights for reports in actual)
        assert_close_by_name(weights, assemble([theirs.weights]), 1e-8, name)


@pytest.mark.more
def test_weights_only(pool: RankPool, path: str, tmp_path: Path) -> None:
    for before, after in pool.run(jobs_features.weights_only, path, FOLD, str(tmp_path), ranks=4):
        assert before == after


@pytest.mark.more
def test_features_that_are_refused(pool: RankPool, path: str, tmp_path: Path) -> None:
    for messages in pool.run(jobs_features.refused, path, "tp2 | ep2", str(tmp_path), ranks=2):
        for name, message in messages.items():
            sentence(message)
            assert name.partition(",")[0].lower() in message.lower(), f"{name}: {message}"
    assert not list(tmp_path.iterdir())


def test_every_row_of_the_page_is_tried() -> None:
    """What docs/refusals.md calls refused is named where the tests have it refused."""
    root = Path(__file__).parents[2]
    places = {
        "optim": "test_optimizers",
        "checkpoint": "jobs_saved test_saved test_stores jobs_background test_background",
        "lifecycle": "jobs_precision jobs_accumulation jobs_even_batches",
        "strategy": "jobs_features jobs_bad_input jobs_hooks test_hooks jobs_trees jobs_like_lightning",
        "balance": "jobs_rebalancer test_rebalancer",
        "adapters": "test_quantized",
    }
    files = [root / "tests" / folder / f"{name}.py" for folder, names in places.items() for name in names.split()]
    tried = "".join(file.read_text() for file in files).lower()
    _, _, table = (root / "docs" / "refusals.md").read_text().partition("## What is refused")
    lines = table.partition("## What to know")[0].splitlines()
    rows = [line.split("|")[1] for line in lines if line.startswith("| ")]
    assert len(rows) > 15
    for row in rows[1:]:
        words = " ".join(re.findall(r"`[^`]+`", row)) or row  # of a row with names in code, those
        named = set(re.findall(r"[a-z_]{4,}|\d\d-\w+|mps|tpu", words.lower()))
        missing = {name for name in named if name not in tried} - {
            "whose",
            "matrix",
            "automatic",
            "optimization",
            "prediction",
        }
        assert not missing, row


@pytest.mark.more
def test_anomalies_are_looked_for_over_data_ranks(pool: RankPool, path: str) -> None:
    assert pool.run(jobs_features.anomalies, path, "", ranks=2) == ["no error"] * 2


def test_a_compiled_module(pool: RankPool, path: str) -> None:
    for message in pool.run(jobs_features.compiled, path, ranks=2):
        sentence(message)
        assert "compile" in message


def test_plain_modules_keep_what_sharded_ones_cannot_have(pool: RankPool, tmp_path: Path) -> None:
    assert pool.run(jobs_features.own_checkpoint_io, str(tmp_path), ranks=2) == [True, True]

# SPDX-License-Identifier: Apache-2.0
"""Data that ends at different times on different ranks is one sentence on all of them, at once."""

from __future__ import annotations

import re
from typing import Any

import pytest

from lightning_moefold.testing import RankPool, make_checkpoint
from tests.lifecycle import jobs_even_batches
from tests.strategy.test_bad_input import sentence

ENDED = r"UnevenBatches: {} has ended after {} batches on data rank {}, and data rank {} had more; .* by limit_{}_batches={}\."
NUMBERS = r"UnevenBatches: {} has different numbers of batches, {} on data rank 0, {} on data rank 1; .* by limit_{}_batches\."
CASES: dict[str, dict[str, Any]] = {
    "stream": {"train": [3, 4], "says": ENDED.format("training", 3, 0, 1, "train", 3), "steps": 2},
    "second rank": {"train": [4, 3], "says": ENDED.format("training", 3, 1, 0, "train", 3), "steps": 2},
    "accumulated": {
        "train": [3, 5], "trainer": {"accumulate_grad_batches": 2}, "says": ENDED.format("training", 3, 0, 1, "train", 3),
        "steps": 1,
    },
    "no batch": {"train": [2, 0], "says": ENDED.format("training", 0, 1, 0, "train", 0), "steps": 0},
    "broken promise": {
        "train": [4, 3], "kind": "promising", "says": ENDED.format("training", 3, 1, 0, "train", 3), "steps": 3,
    },
    "known": {"train": [3, 4], "kind": "rows", "says": NUMBERS.format("training", 3, 4, "train"), "steps": 0},
    "known to be none": {"train": [3, 0], "kind": "rows", "says": NUMBERS.format("training", 3, 0, "train"), "steps": 0},
    "validation": {"val": [2, 3], "says": ENDED.format("validation", 2, 0, 1, "val", 2), "steps": 3},
    "before training": {
        "val": [3, 2], "trainer": {"num_sanity_val_steps": 5}, "says": ENDED.format("validation", 2, 1, 0, "val", 2), "steps": 0,
    },
    "validate": {"entry": "validate", "val": [2, 3], "says": ENDED.format("validation", 2, 0, 1, "val", 2)},
    "validate, broken promise": {
        "entry": "validate", "val": [3, 2], "kind": "promising", "says": ENDED.format("validation", 2, 1, 0, "val", 2),
    },
    "test": {"entry": "test", "val": [2, 3], "kind": "rows", "says": NUMBERS.format("testing", 2, 3, "test")},
    "micro-batches": {"microbatches": [2, 1], "says": "UnsupportedFeature: num_microbatches differs, 1 on rank 1, 2 on rank 0; .*"},
    "plain module": {"plain": True, "train": [3, 4], "says": ENDED.format("training", 3, 0, 1, "train", 3), "steps": 2},
    "plain module, validation": {"plain": True, "val": [2, 3], "says": "no error", "steps": 6},
    "all broken promises": {"kind": "promising", "says": "no error", "steps": 6},
    "even": {"trainer": {"accumulate_grad_batches": 2, "val_check_interval": 2}, "says": "no error", "steps": 4},
    "limited": {"train": [3, 4], "trainer": {"limit_train_batches": 3}, "says": "no error", "steps": 6},
    "enough": {
        "train": [3, 4], "trainer": {"max_steps": 3, "max_epochs": -1, "limit_val_batches": 0}, "says": "no error", "steps": 3,
    },
    "known to be enough": {
        "train": [3, 4], "kind": "rows", "trainer": {"max_steps": 3, "max_epochs": -1, "limit_val_batches": 0},
        "says": "no error", "steps": 3,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("model") / "qwen", "qwen3_moe", num_experts=4))


def check(pool: RankPool, path: str, world: int, fold: str, cases: dict[str, dict[str, Any]]) -> None:
    for said in pool.run(jobs_even_batches.run, path, fold, cases, ranks=world, timeout=300):
        for name, case in cases.items():
            message, steps, seconds = said[name]
            assert re.fullmatch(case["says"], message), f"{name}: {message}"
            assert steps == case.get("steps", 0), name
            assert seconds < 60, name
            if case["says"] != "no error":
                sentence(message)


def test_data_ends_on_some_ranks(pool: RankPool, path: str) -> None:
    check(pool, path, 2, "| ep2", CASES)


@pytest.mark.parametrize(
    "fold",
    ["pp2 | ep2", pytest.param("tp2 | etp2", marks=pytest.mark.slow), pytest.param("cp2", marks=pytest.mark.slow)],
)
@pytest.mark.more
def test_data_ends_in_a_fold(pool: RankPool, path: str, fold: str) -> None:
    names = ["stream", "accumulated", "broken promise", "validation", "even"]
    check(pool, path, 4, fold, {name: {**CASES[name], "microbatches": 2} for name in names})

# SPDX-License-Identifier: Apache-2.0
"""A learning rate that falls until the end of the run, and runs whose end is not known."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_moefold.recipes import FineTuneModule, InputError
from lightning_moefold.recipes.optimizer import run_length
from lightning_moefold.testing import RankPool, make_checkpoint
from tests.recipes import jobs_run_length

STAGED = GradientAccumulationScheduler({0: 4, 2: 1})


@pytest.mark.parametrize(
    ("epochs", "steps", "batches", "accumulate", "callbacks", "expected"),
    [
        (3, -1, 10, 1, [], 30),
        (3, 12, 10, 1, [], 12),
        (3, 70, 10, 1, [], 30),
        (3, -1, 10, 4, [], 9),
        (3, -1, 10, 4, [STAGED], 3 + 3 + 10),
        (-1, 12, 10, 1, [], 12),
        (None, 12, 10, 1, [], 12),
        (3, 12, math.inf, 1, [], 12),
        (3, -1, math.inf, 1, [], "as the training data has no length; set max_steps of the Trainer, total_steps"),
        (-1, -1, math.inf, 1, [], "as the training data has no length"),
        (-1, -1, 10, 1, [], "as max_epochs=-1 is endless; set max_steps of the Trainer, total_steps"),
    ],
)
def test_run_length(
    epochs: Any, steps: int, batches: Any, accumulate: int, callbacks: list[Any], expected: Any
) -> None:
    trainer: Any = SimpleNamespace(
        max_epochs=epochs, max_steps=steps, num_training_batches=batches, accumulate_grad_batches=accumulate,
        callbacks=callbacks,
    )  # fmt: skip
    if isinstance(expected, int):
        assert run_length(trainer) == expected
    else:
        with pytest.raises(InputError, match=expected):
            run_length(trainer)


def test_total_steps_is_a_number_of_steps() -> None:
    with pytest.raises(InputError, match="total_steps=0 must be at least 1"):
        FineTuneModule("somewhere", total_steps=0)


def linear(total: int, steps: int) -> list[float]:
    return [0.5] + [1 - 0.9 * min(1.0, (step - 1) / (total - 1)) for step in range(1, steps)]


@pytest.mark.more
def test_learning_rates_of_streams_and_endless_runs(pool: RankPool, tmp_path: Path) -> None:
    path = str(make_checkpoint(tmp_path / "model", "qwen3_moe", vocab_size=96))
    falls: dict[str, Any] = {"schedule": "linear"}
    endless = {"max_epochs": -1, "max_time": {"seconds": 2}}
    cases: list[tuple[dict[str, Any], dict[str, Any], bool, Any]] = [
        (falls, {"max_epochs": 1}, False, linear(6, 6)),
        (falls, {"max_epochs": 1, "accumulate_grad_batches": 2}, True, "the training data has no length"),
        (falls, {"max_epochs": 1}, True, "the training data has no length"),
        (falls, {"max_epochs": 1, "limit_train_batches": 4}, True, linear(4, 4)),
        (falls, {"max_epochs": -1, "max_steps": 8}, True, linear(8, 8)),
        (falls | {"total_steps": 5}, {"max_epochs": 1}, True, linear(5, 6)),
        ({"schedule": "constant"}, {"max_epochs": 1}, True, [0.5, 1, 1, 1, 1, 1]),
        (falls, endless, False, "max_epochs=-1 is endless"),
        ({"schedule": "cosine"}, endless, False, "max_epochs=-1 is endless"),
        (falls, {"max_epochs": 2, "accumulate": {0: 3, 1: 1}}, False, linear(8, 8)),
    ]
    [found] = pool.run(jobs_run_length.rates, path, "", [case[:3] for case in cases], ranks=1)
    for (*case, expected), (rates, message) in zip(cases, found, strict=True):
        if isinstance(expected, str):
            assert rates == [], case
            assert message.startswith("InputError: "), case
            assert expected in message
            assert "\n" not in message
        else:
            assert message == "", case
            assert rates == pytest.approx(expected), case


@pytest.mark.more
def test_ranks_with_unequal_numbers_of_steps(pool: RankPool, tmp_path: Path) -> None:
    path = str(make_checkpoint(tmp_path / "model", "qwen3_moe", vocab_size=96))
    cases: list[Any] = [({}, {"max_epochs": 1}, 8), ({}, {"max_epochs": 1, "max_steps": 2}, 8)]
    for (refused, message), (rates, fine) in pool.run(jobs_run_length.rates, path, "| ep2", cases, ranks=2):
        assert refused == []
        assert message.startswith("InputError: ranks have from 2 to 6 steps to make")
        assert (len(rates), fine) == (2, "")

# SPDX-License-Identifier: Apache-2.0
"""What could not be read back from a checkpoint is refused before training, not at the first save."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_moefold.testing import RankPool, make_checkpoint
from tests.checkpoint import jobs_saved


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("model") / "qwen", "qwen3_moe", num_experts=4))


def test_refused_before_training(pool: RankPool, path: str, tmp_path: Path) -> None:
    for outcome in pool.run(jobs_saved.refused, path, "| ep2", str(tmp_path), ranks=2):
        for name, (_, _, _, pattern) in jobs_saved.CASES.items():
            message, steps = outcome[name]
            assert message.startswith("CheckpointError"), (name, message)
            assert pattern in message, (name, message)
            assert "\n" not in message
            assert steps == 0, name
    assert not list(tmp_path.iterdir())


def test_plain_data_is_saved(pool: RankPool, path: str, tmp_path: Path) -> None:
    [told] = pool.run(jobs_saved.fine, path, str(tmp_path), ranks=1)
    assert told == ["no error", "no error"]

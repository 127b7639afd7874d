# SPDX-License-Identifier: Apache-2.0
"""``lora`` of the shipped module, in bf16-mixed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_moefold.errors import InputError
from lightning_moefold.recipes import FineTuneModule
from lightning_moefold.testing import RankPool, make_checkpoint
from tests.adapters import jobs

LORA = {"rank": 4, "targets": ["q_proj", "gate", "experts", "down_proj"]}


def test_mixed_precision(pool: RankPool, tmp_path: Path) -> None:
    path = str(make_checkpoint(tmp_path / "model", "qwen2_moe"))
    (alone,) = pool.run(jobs.fit, path, "", LORA, ranks=1)
    for losses, dtypes, states in pool.run(jobs.fit, path, "tp2 | etp2", LORA, ranks=2):
        # Later a token takes another expert because it is rounded otherwise, and runs of so small a model part.
        assert losses[:10] == pytest.approx(alone[0][:10], rel=2e-2)
        assert sum(losses[-5:]) < sum(losses[:5]) - 0.5
        assert dtypes == {"router": torch.float32, "attention": torch.bfloat16}
        assert states == 2 * (2 + 2 + 2) + 2 * 5  # of A and B alone: attention, router, shared expert; experts
    assert sum(alone[0][-5:]) < sum(alone[0][:5]) - 0.5


def test_what_is_wrong_is_said_at_once() -> None:
    with pytest.raises(InputError, match="no field 'rnk'"):
        FineTuneModule("nowhere", adapter={"rnk": 4})

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


@pytest.mark.more
def test_mixed_precision(pool: RankPool, tmp_path: Path) -> None:
    """A fold costs no more precision than bfloat16 costs one rank, against float32, over all steps."""
    path = str(make_checkpoint(tmp_path / "model", "qwen2_moe"))
    ((exact, _, _),) = pool.run(jobs.fit, path, "", LORA, "32-true", ranks=1)
    ((alone, _, _),) = pool.run(jobs.fit, path, "", LORA, ranks=1)
    for losses, dtypes, states in pool.run(jobs.fit, path, "tp2 | etp2", LORA, ranks=2):
        assert _worst(losses, exact) < 2 * _worst(alone, exact)
        assert losses[:5] == pytest.approx(exact[:5], rel=2e-2)  # before rounding has sent tokens to other experts
        assert dtypes == {"router": torch.float32, "attention": torch.bfloat16}
        assert states == 2 * (2 + 2 + 2) + 2 * 5  # of A and B alone: attention, router, shared expert; experts
        assert sum(losses[-5:]) < sum(losses[:5]) - 0.5
    for losses, _, _ in pool.run(jobs.fit, path, "tp2 | etp2", LORA, "32-true", ranks=2):
        assert losses == pytest.approx(exact, rel=1e-4)


def _worst(losses: list[float], exact: list[float]) -> float:
    return max(abs(a - b) / b for a, b in zip(losses, exact, strict=True))


def test_what_is_wrong_is_said_at_once() -> None:
    with pytest.raises(InputError, match="no field 'rnk'"):
        FineTuneModule("nowhere", adapter={"rnk": 4})

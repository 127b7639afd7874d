# SPDX-License-Identifier: Apache-2.0
"""``fold=[...]``: a run goes on, on fewer ranks, under the first fold that they can form."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_moefold import MoEFoldStrategy
from lightning_moefold.errors import InputError
from lightning_moefold.testing import RankPool, assert_close_by_name, make_checkpoint
from lightning_moefold.testing.pieces import assemble
from tests.strategy import finetune

FOLDS = ["tp2 | ep4", "| ep2"]


def test_fewer_ranks_go_on(pool: RankPool, tmp_path: Path) -> None:
    path, folder = str(make_checkpoint(tmp_path / "model", "qwen2_moe", num_experts=4)), tmp_path / "saved"
    whole = pool.run(finetune.fit, path, FOLDS, {}, {"max_steps": 4}, ranks=4)
    pool.run(finetune.fit, path, FOLDS, {}, {"max_steps": 2}, None, str(folder), ranks=4)
    [saved] = folder.iterdir()
    rest = pool.run(finetune.fit, path, FOLDS, {}, {"max_steps": 4}, str(saved), ranks=2)
    assert rest[0].losses == pytest.approx(whole[0].losses[2:], rel=1e-9)
    assert_close_by_name(assemble(r.weights for r in rest), assemble(r.weights for r in whole), 1e-9, "weights")


@pytest.mark.parametrize("folds", [[], ["auto", "| ep2"]])
def test_lists_that_say_nothing(folds: list[str]) -> None:
    with pytest.raises(InputError, match="must name folds in order of preference"):
        MoEFoldStrategy(fold=folds)

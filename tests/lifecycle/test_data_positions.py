# SPDX-License-Identifier: Apache-2.0
"""A loader with ``state_dict`` keeps its place on each data rank."""

from __future__ import annotations

from pathlib import Path

from lightning_moefold.testing import RankPool, make_checkpoint
from tests.lifecycle import jobs_data_positions


def test_each_data_rank_goes_on_at_its_own_place(pool: RankPool, tmp_path: Path) -> None:
    path = str(make_checkpoint(tmp_path / "model", "qwen3_moe", num_experts=4))
    whole = pool.run(jobs_data_positions.stream, path, "| ep2", str(tmp_path / "whole"), 4, None, ranks=2)
    assert [seen for _, seen, _ in whole] == [[0, 1, 2, 3], [0, 2, 4, 6]]
    pool.run(jobs_data_positions.stream, path, "| ep2", str(tmp_path / "a"), 2, None, ranks=2)
    saved = str(tmp_path / "a" / "step=2.ckpt")
    later = pool.run(jobs_data_positions.stream, path, "| ep2", str(tmp_path / "b"), 4, saved, ranks=2)
    assert [seen for _, seen, _ in later] == [[2, 3], [4, 6]]
    for _, seen, sentence in pool.run(
        jobs_data_positions.stream, path, "tp2 | ep2", str(tmp_path / "c"), 4, saved, ranks=2
    ):
        assert seen == []
        assert "for each of 2 data ranks, which says nothing about 1; resume under a fold with dp=2" in sentence

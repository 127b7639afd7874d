# SPDX-License-Identifier: Apache-2.0
"""Saves in the background hold the state of their step, while training goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_moefold.checkpoint.chunk_reader import StoredTensors
from lightning_moefold.checkpoint.sharded import load_meta
from lightning_moefold.testing import RankPool
from tests.checkpoint import jobs_background as jobs
from tests.quick import quick


def _content(path: Path) -> dict[str, torch.Tensor]:
    stored = StoredTensors(path, load_meta(path))
    return {name: stored.read(name) for name in stored.items}


def _same(a: Path, b: Path) -> None:
    ours, theirs = _content(a), _content(b)
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    assert load_meta(a)["global_step"] == load_meta(b)["global_step"]


@pytest.mark.parametrize(
    ("fold", "ranks"),
    quick([("tp2 | ep2", 2), ("| ep2", 4), ("pp2 | etp2", 4), ("tp2 | etp2", 2)], ("tp2 | ep2", 2)),
)
def test_state_of_the_step(pool: RankPool, path: str, tmp_path: Path, fold: str, ranks: int) -> None:
    """Each checkpoint is, bit for bit, that of a run whose saves stop training."""
    stopped, going = tmp_path / "stopped", tmp_path / "going"
    pool.run(jobs.save, path, fold, str(stopped), False, ranks=ranks)
    seen = pool.run(jobs.save, path, fold, str(going), True, ranks=ranks)
    assert sorted(p.name for p in going.iterdir()) == [f"step={i}.ckpt" for i in range(1, 5)]
    for i in range(1, 5):
        _same(going / f"step={i}.ckpt", stopped / f"step={i}.ckpt")
    for rank in seen:
        assert any(under_way and len(names) < step for step, (names, under_way) in enumerate(rank, 1)), rank


@pytest.mark.more
def test_the_newest_complete_one_stays(pool: RankPool, path: str, tmp_path: Path) -> None:
    """With save_top_k=1 and save_last there is a complete checkpoint from the first one on, and at the end only the newest."""
    [seen] = pool.run(jobs.save, path, "", str(tmp_path), True, save_top_k=1, save_last=True, ranks=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.ckpt", "step=4.ckpt"]
    begun = False
    for names, _ in seen:
        assert names or not begun
        begun = begun or bool(names)
    assert begun
    _same(tmp_path / "last.ckpt", tmp_path / "step=4.ckpt")


@pytest.mark.parametrize("at", quick([1, 2, 4]))
def test_a_disk_that_is_full(pool: RankPool, path: str, tmp_path: Path, at: int) -> None:
    """The error comes with the next save or at the end, on all ranks; the checkpoint before is kept."""
    outcome = pool.run(jobs.fail, path, "| ep2", str(tmp_path), at, ranks=2)
    for said, steps, left in outcome:
        assert "no space is left on the disk" in said, said
        assert steps == min(at + 1, 4)
        assert left == ([] if at == 1 else [f"step={at - 1}.ckpt"])
    assert outcome[0][0].startswith("PeerError: rank 1 failed")
    assert outcome[1][0].startswith("CheckpointError")


@pytest.mark.more
def test_at_the_end_of_a_run(pool: RankPool, path: str, tmp_path: Path) -> None:
    [said] = pool.run(jobs.refuse, path, str(tmp_path / "a"), ranks=1)
    assert said[0].startswith('UnsupportedFeature: save_last="link"')
    assert said[1].startswith("UnsupportedFeature: async_save is for models with MoE blocks")
    [(said, left)] = pool.run(jobs.exit_early, path, str(tmp_path / "b"), ranks=1)
    assert said == "RuntimeError: of training"
    assert left == ["step=1.ckpt", "step=2.ckpt"]


def test_the_next_start_removes_what_was_killed(pool: RankPool, path: str, tmp_path: Path) -> None:
    [left] = pool.run(jobs.start_anew, path, str(tmp_path), ranks=1)
    assert left == []

# SPDX-License-Identifier: Apache-2.0
"""What Lightning offers around a training works for a plain module as under DDP, and on one rank for any module."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch.distributed as dist
from torch.utils.data import DataLoader

from lightning_moefold import MoEFoldStrategy
from lightning_moefold.testing import RankPool, assert_close_by_name, make_checkpoint
from tests.quick import quick
from tests.strategy import jobs_like_lightning
from tests.strategy.test_bad_input import sentence


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "qwen"
    return str(make_checkpoint(folder, "qwen3_moe", num_experts=4, num_hidden_layers=1))


def _same(ours: Any, theirs: Any, what: str) -> None:
    assert len(ours[0]) == len(theirs[0]) > 2, "no losses"
    tolerance = 1e-6 if what == "pruning" else 1e-10
    assert ours[0] == pytest.approx(theirs[0], rel=tolerance), what
    assert_close_by_name(ours[1], theirs[1], tolerance, what)


@pytest.mark.parametrize("name", quick([n for n in jobs_like_lightning.CALLBACKS if n != "batch finder"], "unfreezing"))
@pytest.mark.more
def test_callbacks_on_two_ranks_like_one_device(pool: RankPool, tmp_path: Path, name: str) -> None:
    """DDP is no measure here: it never sums gradients of what was frozen when it was made."""
    [theirs] = pool.run(jobs_like_lightning.with_callback, "auto", name, None, str(tmp_path), ranks=1)
    first, second = pool.run(jobs_like_lightning.with_callback, "", name, None, str(tmp_path), ranks=2)
    losses = [(a + b) / 2 for a, b in zip(first[0], second[0], strict=True)]
    assert first[0] != second[0]
    for _, weights in (first, second):
        _same((losses, weights), theirs, name)


#: Pruning of a module with blocks is left out: a mask that is made once and used twice fails on one device as well.
ON_ONE_RANK = [
    (name, blocks)
    for name in jobs_like_lightning.CALLBACKS
    for blocks in (False, True)
    if (name, blocks) != ("pruning", True)
]


@pytest.mark.parametrize(("name", "blocks"), quick(ON_ONE_RANK, *[case for case in ON_ONE_RANK if case[1]][:2]))
def test_callbacks_on_one_rank_like_one_device(
    pool: RankPool, path: str, tmp_path: Path, name: str, blocks: bool
) -> None:
    given = path if blocks else None
    [theirs] = pool.run(jobs_like_lightning.with_callback, "auto", name, given, str(tmp_path), ranks=1)
    [ours] = pool.run(jobs_like_lightning.with_callback, "", name, given, str(tmp_path), ranks=1)
    _same(ours, theirs, name)


@pytest.mark.parametrize("blocks", quick([False, True], True))
@pytest.mark.more
def test_searches_on_one_rank(pool: RankPool, path: str, tmp_path: Path, blocks: bool) -> None:
    given = path if blocks else None
    [theirs] = pool.run(jobs_like_lightning.tuned, "auto", given, str(tmp_path), ranks=1)
    [ours] = pool.run(jobs_like_lightning.tuned, "", given, str(tmp_path), ranks=1)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    assert ours[1:] == theirs[1:]
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.more
def test_search_for_a_learning_rate_on_two_ranks(pool: RankPool, tmp_path: Path) -> None:
    theirs = pool.run(jobs_like_lightning.tuned, None, None, str(tmp_path), False, ranks=2)
    for ours, ddp in zip(
        pool.run(jobs_like_lightning.tuned, "", None, str(tmp_path), False, ranks=2), theirs, strict=True
    ):
        assert ours[0] == pytest.approx(ddp[0], rel=1e-5)
        assert ours[1] == ddp[1]


@pytest.mark.more
def test_saving_on_an_exception(pool: RankPool, path: str, tmp_path: Path) -> None:
    for given, ranks in ((None, 2), (path, 1)):
        folder = tmp_path / str(ranks)
        assert (
            pool.run(jobs_like_lightning.on_exception, "", given, str(folder), ranks=ranks)
            == [["on_exception.ckpt"]] * ranks
        )


@pytest.mark.parametrize("ranks", quick([1, 2], 2))
def test_a_trainer_that_has_run_can_be_pickled(pool: RankPool, tmp_path: Path, ranks: int) -> None:
    for told in pool.run(jobs_like_lightning.copies, str(tmp_path), None, ranks=ranks):
        assert told == ["MoEFoldStrategy", "MoEFoldStrategy", str(8 // ranks)]


@pytest.mark.parametrize("ranks", quick([1, 2], 2))
@pytest.mark.more
def test_resuming_like_ddp(pool: RankPool, tmp_path: Path, ranks: int) -> None:
    """The same order of hooks, state of callbacks that is no plain data, names of files, and weights."""
    theirs = pool.run(jobs_like_lightning.resumed, None, str(tmp_path), ranks=ranks)
    for ours, ddp in zip(pool.run(jobs_like_lightning.resumed, "", str(tmp_path), ranks=ranks), theirs, strict=True):
        assert_close_by_name(ours.pop("weights"), ddp.pop("weights"), 1e-6, "weights")
        assert ours == ddp
        assert ours["batches"] == 2 * 8 // ranks


@pytest.mark.more
def test_saving_before_the_set_up(pool: RankPool, path: str, tmp_path: Path) -> None:
    [theirs] = pool.run(jobs_like_lightning.saved_early, None, None, str(tmp_path), ranks=1)
    [ours] = pool.run(jobs_like_lightning.saved_early, "", None, str(tmp_path), ranks=1)
    assert_close_by_name(ours, theirs, 0.0, "weights")
    [message] = pool.run(jobs_like_lightning.saved_early, "", path, str(tmp_path), ranks=1)
    sentence(message)
    assert "is not saved" in message


@pytest.mark.parametrize("earlier", [False, True])
def test_what_is_known_before_the_processes_start(earlier: bool, request: pytest.FixtureRequest) -> None:
    """Devices and nodes give the fold, and with it the number of steps, also beside an earlier Trainer's process group."""
    if earlier:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        request.addfinalizer(dist.destroy_process_group)
    steps = {}
    for name, strategy in (("ddp", "ddp"), ("ours", MoEFoldStrategy(fold="ep2")), ("tp", MoEFoldStrategy(fold="tp2"))):
        run = pl.Trainer(
            strategy=strategy, accelerator="cpu", devices=2, num_nodes=2, max_epochs=3, logger=False,
            enable_checkpointing=False, limit_train_batches=0.5,
        )  # fmt: skip
        module = jobs_like_lightning.Learner()
        run.strategy.connect(module)
        module.trainer = run
        run._data_connector.attach_data(module)
        steps[name] = run.estimated_stepping_batches
        if isinstance(strategy, MoEFoldStrategy):
            assert (strategy.dp_rank, strategy.dp_size) == (0, 4 if name == "ours" else 2)
            loader = run.train_dataloader
            assert isinstance(loader, DataLoader)
            assert loader.sampler.num_replicas == strategy.dp_size  # type: ignore[attr-defined]
    assert steps == {"ddp": 3, "ours": 3, "tp": 6}


def test_one_rank_runs_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    connector = sys.modules["lightning.pytorch.trainer.connectors.accelerator_connector"]
    monkeypatch.setattr(connector, "_IS_INTERACTIVE", True)
    pl.Trainer(strategy="moefold", accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    with pytest.raises(pl.utilities.exceptions.MisconfigurationException, match="interactive"):
        pl.Trainer(strategy="moefold", accelerator="cpu", devices=2, logger=False, enable_checkpointing=False)

# SPDX-License-Identifier: Apache-2.0
"""A loader with ``state_dict`` keeps its place on each data rank; a sampler deals rows to any number of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_moefold.sampler import order_of_rows
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


def test_a_sampler_reads_the_rows_of_the_uninterrupted_run(pool: RankPool, tmp_path: Path) -> None:
    """Resumed under other data ranks in the middle of an epoch, at its end and in a later one; rows and losses are the same."""
    path = str(make_checkpoint(tmp_path / "model", "qwen3_moe", num_experts=4))
    folder = tmp_path / "whole"
    [(whole, losses, _)] = pool.run(jobs_data_positions.deal, path, "", str(folder), 13, ranks=1)
    order = [row for epoch in range(3) for row in order_of_rows(22, 3, epoch).tolist()]
    assert [row for batch in whole for row in batch] == order[: 13 * 4]
    names = {3: "step=3", 5: "step=5", 10: "end-epoch=1", 11: "step=11"}
    cases = [
        ((path, fold, str(tmp_path / f"{fold}{done}"), 13, str(folder / f"{names[done]}.ckpt"), kind), {})
        for fold, kind, done in [("| ep2", "", 3), ("| ep2", "workers", 5), ("tp2 | etp2", "", 10), ("| ep2", "", 11)]
    ]
    for reports in pool.run(jobs_data_positions.deal_all, cases, ranks=2):
        for (seen, later, said), (arguments, _) in zip(reports, cases, strict=True):
            done = 13 - len(seen)
            assert names[done] in arguments[4], said
            assert seen == whole[done:]
            assert later == pytest.approx(losses[done:], rel=1e-9)
    [(again, _, _)] = pool.run(
        jobs_data_positions.deal,
        path,
        "",
        str(tmp_path / "again"),
        13,
        str(tmp_path / "| ep23" / "step=8.ckpt"),
        ranks=1,
    )
    assert again == whole[8:]


@pytest.mark.more
def test_other_loaders_under_another_number_of_data_ranks(pool: RankPool, tmp_path: Path) -> None:
    path = str(make_checkpoint(tmp_path / "model", "qwen3_moe", num_experts=4))

    def case(fold: str, name: str, saved: str | None = None, kind: str = "lightning", **more: object) -> tuple:
        return (path, fold, str(tmp_path / name), 8, saved and str(tmp_path / saved), kind), more

    first = [case("", "a"), case("", "plain", kind="", plain=True)]
    [reports] = pool.run(jobs_data_positions.deal_all, first, ranks=1)
    whole = reports[1][0]
    two = [
        case("| ep2", "b", "a/step=3.ckpt"),
        case("| ep2", "c", "a/step=6.ckpt"),  # the end of an epoch
        case("tp2 | ep2", "d", "a/step=3.ckpt"),
        case("", "e", "plain/step=3.ckpt", "", plain=True),
        case("| ep2", "f", None, "validation", limit_val_batches=1),
        case("| ep2", "g", None, "two"),
        case("| ep2", "h", None, "", reload_dataloaders_every_n_epochs=1),
    ]
    for refused, at_end, same, plain, *others in pool.run(jobs_data_positions.deal_all, two, ranks=2):
        assert refused[0] == []
        assert (
            "step=3.ckpt was saved in the middle of an epoch on 1 data ranks, and DataLoader does not know"
            in refused[2]
        )
        assert "sampler=lightning_moefold.ResumableSampler(dataset)" in refused[2]
        assert "\n" not in refused[2]
        assert len(at_end[0]) == 2, at_end[2]
        assert len(same[0]) == 5, same[2]
        assert plain[0] == whole[3:], plain[2]
        for (seen, _, said), what in zip(
            others, ("is for training", "have [5, 13] batches", "reload_dataloaders_every_n_epochs"), strict=True
        ):
            assert seen == []
            assert said.startswith("UnsupportedFeature"), said
            assert what in said


@pytest.mark.more
def test_ends_of_epochs(pool: RankPool, tmp_path: Path) -> None:
    """Whatever a checkpoint at the end of an epoch was saved for, the next epoch is the one that would have followed."""
    [found] = pool.run(jobs_data_positions.ends_of_epochs, str(tmp_path), ranks=1)
    assert len(found) >= 3 * 2 * 5
    for what, seen, expected in found:
        assert seen == expected, what


@pytest.mark.slow
def test_later_epochs_and_later_fits(pool: RankPool, tmp_path: Path) -> None:
    """Epochs after that of the checkpoint are read and validated whole, whatever their number of batches; so is a second fit."""
    [found] = pool.run(jobs_data_positions.later_fits, str(tmp_path), ranks=1)
    order = [row for epoch in range(3) for row in order_of_rows(24, 3, epoch).tolist()]
    for name, validated in {"four": [3, 9, 15], "one": [12, 36, 60], "asks": [3, 9, 15]}.items():
        assert found[name] == (order[12:], validated, ""), name
    assert found["seed"][0] == []
    assert "24 rows, shuffle=True and seed=3, and this one has 24 rows, shuffle=True and seed=4" in found["seed"][2]
    assert found["interval"][0] == []
    assert (
        "val_check_interval=8 is more than the 6 training batches of the epochs after this one" in found["interval"][2]
    )
    assert found["twice"][0] == order[:32]

# SPDX-License-Identifier: Apache-2.0
"""ExpertRebalancer under the Trainer; checkpoints, exports and masters of experts that have moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lightning_moefold.balance.placement import Placement
from lightning_moefold.balance.pool import PlacementPool
from lightning_moefold.callbacks import ExpertRebalancer
from lightning_moefold.errors import InputError
from lightning_moefold.models.export import export
from lightning_moefold.testing import RankError, RankPool, assert_close_by_name, make_checkpoint
from lightning_moefold.testing.pieces import assemble
from tests.balance import jobs_rebalancer as jobs


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "qwen"
    return str(make_checkpoint(folder, "qwen2_moe", num_experts=4, vocab_size=97, moe_intermediate_size=8))


def whole(seen: list[Any], what: str) -> dict[str, torch.Tensor]:
    return assemble(getattr(one.report, what) for one in seen)


@pytest.mark.more
def test_checkpoints_hold_experts_by_number(pool: RankPool, path: str, tmp_path: Path) -> None:
    """Saved after moves, resumed under the same fold with the placement, under others without, and exported."""
    folders = {name: str(tmp_path / name) for name in ("stays", "moves", "stays_hf", "moves_hf", "exported")}
    stays = pool.run(jobs.fit, path, "tp2 | ep2", None, folders["stays"], None, folders["stays_hf"], ranks=2)
    moves = pool.run(jobs.fit, path, "tp2 | ep2", {}, folders["moves"], None, folders["moves_hf"], ranks=2)
    assert moves[0].report.losses == pytest.approx(stays[0].report.losses, rel=1e-9)
    for part in ("weights", "state"):
        assert_close_by_name(whole(moves, part), whole(stays, part), 1e-9, part)
    exported = [load_file(Path(folders[name], "model.safetensors")) for name in ("moves_hf", "stays_hf")]
    assert_close_by_name(*exported, 1e-6, "exports")  # written in the source's float32

    checkpoint = str(Path(folders["moves"], "step=10.ckpt"))
    export(checkpoint, folders["exported"], dtype="float64")
    written = load_file(Path(folders["exported"], "model.safetensors"))
    weights = whole(moves, "weights")
    for number in range(4):
        mine = weights["model.layers.1.mlp.experts.up_proj"][number]
        assert torch.equal(written[f"model.layers.1.mlp.experts.{number}.up_proj.weight"], mine)

    checkpoint = str(Path(folders["moves"], "step=3.ckpt"))
    for ranks, folds in ((2, ["tp2 | ep2"]), (1, [""]), (4, ["| ep4", "tp2 | etp2 ep2", "pp2 | ep2"])):
        outcome = pool.run(jobs.resume, path, folds, checkpoint, {"seed": 1}, ranks=ranks)
        for i, fold in enumerate(folds):
            seen, what = [one[i] for one in outcome], f"{fold!r} on {ranks}"
            begins = seen[0].placements[0]
            kept = fold.endswith("ep2")
            assert all(placement.is_contiguous != kept for placement in begins.values()), what
            assert len(begins) == 2
            assert all(one.placements[0] == begins for one in seen)
            if ranks == 2:
                stored = seen
            for part in ("loaded", "loaded_state"):
                assert_close_by_name(whole(seen, part), whole(stored, part), 0.0, f"{part}, {what}")
            assert seen[0].report.losses == pytest.approx(stays[0].report.losses[3:], rel=1e-9), what
            for part in ("weights", "state"):
                assert_close_by_name(whole(seen, part), whole(stays, part), 1e-9, f"{part}, {what}")


@pytest.mark.more
def test_the_base_of_an_adapter_moves_with_it(pool: RankPool, path: str, tmp_path: Path) -> None:
    """A checkpoint with an adapter does not hold the base: what is made anew from it follows the placement."""
    run, folder = (jobs.fit, path, "tp2 | ep2"), str(tmp_path)
    stays = pool.run(*run, None, None, None, None, False, True, ranks=2)
    moves = pool.run(*run, {"seed": 2}, folder, None, None, False, True, ranks=2)
    checkpoint = str(tmp_path / "step=3.ckpt")
    resumed = pool.run(*run, {"seed": 3}, None, checkpoint, None, False, True, ranks=2)
    assert not any(placement.is_contiguous for placement in resumed[0].placements[0].values())
    assert moves[0].report.losses == pytest.approx(stays[0].report.losses, rel=1e-9)
    assert resumed[0].report.losses == pytest.approx(stays[0].report.losses[3:], rel=1e-9)
    for seen in (moves, resumed):
        for part in ("weights", "state"):
            assert_close_by_name(whole(seen, part), whole(stays, part), 1e-9, part)


@pytest.mark.more
def test_another_trainer_finds_experts_where_they_are(pool: RankPool, path: str) -> None:
    """Also where it makes other dispatchers."""
    for losses, kept, kinds in pool.run(jobs.two_trainers, path, ranks=2):
        assert kept
        assert kinds == {"DeduplicatedDispatcher"}
        assert losses[2:] == pytest.approx(losses[:2], rel=1e-12)


@pytest.mark.more
def test_masters_move_with_their_weights(pool: RankPool, path: str) -> None:
    run = (jobs.fit, path, "| ep2")
    stays, moves = (
        pool.run(*run, given, None, None, None, True, ranks=2) for given in (None, {"renumber": True, "keep": True})
    )
    assert moves[0].report.losses == stays[0].report.losses
    assert "model.layers.0.mlp.experts.up_proj.master" in whole(moves, "state")
    for part in ("weights", "state"):
        for name, value in whole(stays, part).items():
            assert torch.equal(value, whole(moves, part)[name]), name


@pytest.mark.more
def test_copies_and_moves_together(pool: RankPool, path: str) -> None:
    """By default the callback asks for copies, too; with ``slow=False`` only for them."""
    stays = pool.run(jobs.rebalance, path, "| ep2", None, ranks=2)
    for more in ({}, {"slow": False}):
        both = pool.run(jobs.rebalance, path, "| ep2", {"interval": 1, "margin": 0.0, **more}, ranks=2)
        assert both[0].policy == "joint"
        assert more == {} or both[0].moves == 0
        for one in both:
            assert one.report.losses == pytest.approx(stays[0].report.losses, rel=1e-9)
        assert_close_by_name(whole(both, "weights"), whole(stays, "weights"), 1e-9, "copies and moves")


@pytest.mark.more
@pytest.mark.parametrize("policy", ["joint", "eplb", "flexmoe"])
def test_copies_from_past_loads(pool: RankPool, path: str, policy: str) -> None:
    """With homes that move and with homes that stay, the run stays what it was; copies come with the first check."""
    stays = pool.run(jobs.rebalance, path, "| ep2", None, ranks=2)
    given = {"policy": policy, "interval": 1, "margin": 0.0, "fast": False, "max_copies_per_rank": 1}
    for slow in (True, False):
        both = pool.run(jobs.rebalance, path, "| ep2", given | {"slow": slow}, ranks=2)
        assert policy != "eplb" or both[0].copies > 0  # the others know that a copy of so small an expert does not pay
        assert slow or both[0].moves == 0
        for rank, one in enumerate(both):
            assert one.report.losses == pytest.approx(stays[0].report.losses, rel=1e-9)
            assert one.rows == one.read[:, rank].tolist()  # counters know what copies compute
        assert_close_by_name(whole(both, "weights"), whole(stays, "weights"), 1e-9, policy)


@pytest.mark.parametrize(("fold", "ranks"), [("tp2 | ep2", 2), pytest.param("pp2 | ep2", 4, marks=pytest.mark.more)])
def test_rebalancing_a_run(pool: RankPool, path: str, fold: str, ranks: int) -> None:
    """Experts move, every rank knows it, and the run stays what it was."""
    stays = pool.run(jobs.rebalance, path, fold, None, ranks=ranks)
    moves = pool.run(jobs.rebalance, path, fold, {"interval": 1, "margin": 0.0, "fast": False}, ranks=ranks)
    assert moves[0].moves > 0
    assert any(not placement.is_contiguous for step in moves[0].placements for placement in step.values())
    for one in moves:
        assert (one.moves, one.placements, one.logged) == (moves[0].moves, moves[0].placements, moves[0].logged)
        assert one.report.losses == pytest.approx(stays[0].report.losses, rel=1e-9)
    assert_close_by_name(whole(moves, "weights"), whole(stays, "weights"), 1e-9, fold)
    last = moves[0].logged[-1]
    assert last["balance/moves"] == moves[0].moves
    assert last["balance/moved_bytes"] > 0
    assert {
        "balance/imbalance",
        "balance/imbalance_predicted",
        "balance/measured_gain_s",
        "balance/move_s",
    } <= last.keys()
    assert any(f["balance/imbalance_predicted"] < f["balance/imbalance"] for f in moves[0].logged)
    assert any(line.startswith("ExpertRebalancer moved ") for line in moves[0].said)
    assert all(not one.said for one in moves[1:])
    for seen in (stays, moves):  # what the counters say of each rank is what it has computed
        assert seen[0].read.sum() == sum(sum(one.rows) for one in seen)
    if ranks == 2:
        assert moves[0].read.T.tolist() == [one.rows for one in moves]


def test_leaving_alone_says_why_once(pool: RankPool, path: str) -> None:
    seen = pool.run(
        jobs.rebalance, path, "| ep2", {"policy": "smartmoe_greedy", "interval": 1, "margin": 0.99}, ranks=2
    )
    assert seen[0].moves == 0
    kinds = ["knows nothing that is better" in line for line in seen[0].said]
    assert any("gain less than margin=0.99 of a layer's time" in line for line in seen[0].said)
    assert all(a != b for a, b in zip(kinds, kinds[1:], strict=False))  # one line for each change of mind
    assert all(placement.is_contiguous for step in seen[0].placements for placement in step.values())


def test_a_pool_of_placements(pool: RankPool, path: str, tmp_path: Path) -> None:
    """A policy that moves nothing by itself moves to what the file offers; files that differ between ranks are refused."""
    every = tuple(Placement(slots, 2) for slots in ((0, 1, 2, 3), (0, 2, 1, 3), (0, 3, 1, 2)))
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    PlacementPool((every, every)).save(files[0])
    PlacementPool((every, every[:1])).save(files[1])
    stays = pool.run(jobs.rebalance, path, "| ep2", None, ranks=2)
    given = {"policy": "llep", "interval": 1, "margin": 0.0, "fast": False, "pool": [str(files[0])] * 2}
    moves = pool.run(jobs.rebalance, path, "| ep2", given, ranks=2)
    assert moves[0].moves > 0
    for one in moves:
        assert one.placements == moves[0].placements
        assert one.report.losses == pytest.approx(stays[0].report.losses, rel=1e-9)
    assert_close_by_name(whole(moves, "weights"), whole(stays, "weights"), 1e-9, "pool")
    with pytest.raises(RankError, match=r"the file of pool is not the same on all ranks"):
        pool.run(jobs.rebalance, path, "| ep2", given | {"pool": list(map(str, files))}, ranks=2)


def test_what_is_refused(pool: RankPool) -> None:
    first, second = pool.run(jobs.refusals, ranks=2)
    words = {
        "ep = 1": "InputError: ExpertRebalancer has nothing to move under tp2",
        "random numbers": "UnsupportedFeature: experts of layer cannot move to other ranks: Sequential draws random numbers",
        "transformer engine": "UnsupportedFeature: experts of layer cannot move to other ranks: expert_kernel='transformer_engine'",
        "padding": "InputError: ExpertRebalancer has nothing to gain with pad_to_capacity=True",
        "no permutation": "InputError: a placement of 4 experts must name each of 0 to 3 once, which (0, 0, 1, 2) does not",
        "another layer's": "InputError: a placement of 6 experts on 2 parts cannot follow one of 4 experts on 2",
        "unknown state": "'columns' of shape [8] for 'layer.experts.",
    }
    for name, text in words.items():
        assert text in first[name], (name, first[name])
        assert text in second[name] or "PeerError" in second[name], (name, second[name])
    assert first["no layer"].startswith("InputError: ExpertRebalancer")


def test_moves_by_hand_are_checked(pool: RankPool) -> None:
    for messages in pool.run(jobs.refused_moves, ranks=2):
        assert "no rank has a MoE layer 'other'" in messages[0]
        assert "4 experts on 4 parts cannot follow one of 4 experts on 2" in messages[1]
        assert "ranks were given different placements" in messages[2]


def test_bad_arguments() -> None:
    with pytest.raises(InputError, match="policy 'eplb2' is not known"):
        ExpertRebalancer("eplb2")

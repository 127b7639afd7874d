# SPDX-License-Identifier: Apache-2.0
"""A network of one's own in pipeline stages and over cp: trained as one process does (float64, errors below 1e-9)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_moefold import Fold
from lightning_moefold.testing import RankPool, assert_close_by_name, relative_error
from lightning_moefold.testing.pieces import assemble
from tests.networks import jobs_layered
from tests.networks.test_networks import _unclipped
from tests.quick import quick


def check(pool: RankPool, world: int, fold: str, spec: dict[str, Any]) -> None:
    spec = {"head": "pair", **spec}
    parsed = Fold.parse(fold, world)
    data = jobs_layered.make_data(3 * spec.get("accumulate", 1), parsed.dp, spec.get("microbatches", 2))
    if spec.get("short"):  # micro-batches without rows, not the same on every rank
        data[0] = [{name: t[: 1 + rank] for name, t in batch.items()} for rank, batch in enumerate(data[0])]
    expected, outputs = jobs_layered.train_alone(data, spec)
    found = pool.run(jobs_layered.train, fold, data, spec, ranks=world)
    actual = [run for run, _, _ in found]
    for rank, (run, logits, _) in enumerate(found):
        data_rank = parsed.coordinates(rank)["dp"]
        torch.testing.assert_close(run.losses, [step[data_rank] for step in expected.losses], rtol=1e-9, atol=0)
        if spec["head"] == "pair":
            assert run.losses == actual[0].losses  # bit by bit
        torch.testing.assert_close(run.balance, expected.balance, rtol=1e-9, atol=0)
        for mine, step in zip(logits, outputs * (1 + spec.get("predict", False)), strict=True):
            assert relative_error(mine, step[data_rank]) < 1e-9
    for step, grads in enumerate(expected.grads):
        whole = assemble(run.grads[step] for run in actual)
        assert_close_by_name(_unclipped(whole, grads), grads, 1e-9, f"gradients of step {step}, {fold} {spec}")
    assert_close_by_name(assemble(r.weights for r in actual), expected.weights, 1e-9, f"weights, {fold} {spec}")
    for name, load_E in expected.loads.items():
        assert torch.equal(sum(run.loads[name] for run in actual if name in run.loads), load_E), name


QUICK = [
    (2, "pp2", {"head": "mean", "balance": True, "accumulate": 2, "sharding": "full", "predict": True}),
    (2, "cp2 | ep2", {"balance": True, "peek": True, "predict": True}),
    (4, "pp2 | ep2", {"calls": True, "microbatches": 3, "frozen": "experts", "tied": True}),
    (4, "cp2 pp2 | etp2", {"head": "mean", "balance": True}),
    (4, "tp2 pp2 | ep2", {"schedule": "interleaved_zero_bubble", "chunks": 2}),
    (4, "pp2 | ep2", {"short": True, "microbatches": 3, "balance": True, "moves": True}),
    (4, "pp4", {"microbatches": 4, "tied": True, "balance": True}),  # a stage without a block
]
MORE = [
    *((2, "pp2", {"schedule": s, "chunks": 2, "balance": True, "microbatches": 4})
      for s in ("interleaved_1f1b", "zbv", "dualpipev")),
    *((4, "pp2 | ep2", {"schedule": s, "microbatches": 4, "chunks": c, "balance": s == "zbv", "accumulate": 2})
      for s, c in (("gpipe", 1), ("interleaved_1f1b", 2), ("interleaved_zero_bubble", 2), ("zbv", 1), ("dualpipev", 1))),
    *((2, "pp2", {"frozen": frozen, "balance": True}) for frozen in ("ends", "first", "last")),
    (2, "pp2", {"recompute": "full", "balance": True, "sharding": "none"}),
    (4, "pp2", {"sharding": "none", "head": "mean", "calls": True}),
    (4, "cp2 | ep4", {"exchange": "ring", "calls": True}),
    (4, "tp2 cp2 | etp2", {"head": "mean", "sharding": "full", "accumulate": 2}),
    (2, "cp2", {"exchange": "all_to_all", "recompute": "selective", "frozen": "first"}),
    (4, "cp4 | ep2", {"exchange": "all_gather", "balance": True, "sharding": "none"}),
    (4, "pp2 | etp2", {"microbatches": 3, "accumulate": 2, "frozen": "last"}),
    (2, "", {"balance": True, "peek": True}),
    (2, "cp2", {"capacity": 0.7, "balance": True}),
    (2, "pp2", {"capacity": 0.7, "balance": True, "microbatches": 3}),
    (4, "cp2 pp2 | ep2", {"short": True, "microbatches": 4, "schedule": "gpipe", "head": "mean"}),
    (4, "pp2 | etp2", {"short": True, "microbatches": 4, "schedule": "zbv", "balance": True}),
    (2, "pp2", {"short": True, "microbatches": 4, "chunks": 2, "schedule": "interleaved_zero_bubble", "head": "mean"}),
    (4, "pp2 | ep2", {"peek": True, "sharding": "full", "head": "mean"}),
    (2, "tp2 | ep2", {"head": "mean", "calls": True}),
    (8, "tp2 pp2 | ep4", {"balance": True, "moves": True}),
    (8, "tp2 cp2 pp2 | ep2", {"balance": True, "schedule": "zbv", "tied": True}),
    (8, "cp2 pp4 | ep2", {"microbatches": 4, "tied": True, "calls": True, "head": "mean"}),
]  # fmt: skip


def _named(cases: list[Any]) -> list[Any]:
    return [pytest.param(*case, id=f"{case[0]}-{case[1]}-{i}") for i, case in enumerate(cases)]


@pytest.mark.parametrize(("world", "fold", "spec"), quick(_named(QUICK), QUICK[0], QUICK[4], QUICK[-1]))
def test_a_layered_network(pool: RankPool, world: int, fold: str, spec: dict[str, Any]) -> None:
    check(pool, world, fold, spec)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "fold", "spec"), _named(MORE))
def test_more_folds_and_schedules(pool: RankPool, world: int, fold: str, spec: dict[str, Any]) -> None:
    check(pool, world, fold, spec)


@pytest.mark.more
def test_resume_under_other_folds(pool: RankPool, tmp_path: Path) -> None:
    data = jobs_layered.make_data(3, 1)
    expected, _ = jobs_layered.train_alone(data, {"head": "pair"})
    folds = ["pp2", "cp2", "tp2 | ep2"]  # one data rank, as the data must be the same
    actual = pool.run(jobs_layered.stop_and_resume, folds, data, str(tmp_path / "last.ckpt"), ranks=2)
    assert_close_by_name(assemble(run.weights for run in actual), expected.weights, 1e-9, "weights")


@pytest.mark.slow
def test_resume_under_other_folds_of_four(pool: RankPool, tmp_path: Path) -> None:
    data = jobs_layered.make_data(3, 1)
    expected, _ = jobs_layered.train_alone(data, {"head": "pair"})
    folds = ["tp2 pp2 | ep2", "pp4", "cp2 pp2 | etp2"]
    # pp4 wants four micro-batches at least, which change nothing.
    data = [[{name: t.repeat(2, *[1] * (t.dim() - 1)) for name, t in batch.items()} for batch in step] for step in data]
    actual = pool.run(jobs_layered.stop_and_resume, folds, data, str(tmp_path / "last.ckpt"), ranks=4)
    assert_close_by_name(assemble(run.weights for run in actual), expected.weights, 1e-9, "weights")


def test_a_rank_holds_its_stages_only(pool: RankPool) -> None:
    data = jobs_layered.make_data(1, 1)
    (first, _, here), (last, _, there) = pool.run(
        jobs_layered.train, "pp2", data, {"head": "mean", "validate": False}, ranks=2
    )
    ends = {"lift.weight", "lift.bias", "position", "out.weight", "out.bias"}
    assert set(here) & set(there) == ends
    assert {name.split(".")[2] for name in set(here) - ends} == {"0", "1"}
    assert {name.split(".")[2] for name in set(there) - ends} == {"2", "3"}
    assert first.losses == last.losses


def test_tokens_are_counted_once(pool: RankPool) -> None:
    """And meet the same noise when they pass again for the load-balancing loss."""
    for once, twice, chosen, again in pool.run(jobs_layered.counted, "pp2 | ep2", ranks=4):
        assert repr(once) == repr(twice)
        assert once[0][0] == once[0][1]
        assert once[0][2:3] == [2]  # micro-batches
        assert once[0][3]["passes"] == 2
        assert len(chosen) == len(again) == 2
        assert all(torch.equal(*pair) for pair in zip(chosen, again, strict=True))


@pytest.mark.parametrize("fold", ["pp2", pytest.param("cp2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("sharding", ["optimizer", pytest.param("none", marks=pytest.mark.slow)])
@pytest.mark.more
def test_mixed_precision_is_near_float32(pool: RankPool, fold: str, sharding: str) -> None:
    data = jobs_layered.make_data(2, 1)
    spec = {"head": "pair", "balance": True, "sharding": sharding, "validate": False, "dtype": torch.float32}
    plain, mixed = (
        [run for run, _, _ in pool.run(jobs_layered.train, fold, data, {**spec, "precision": precision}, ranks=2)]
        for precision in ("32-true", "bf16-mixed")
    )
    assert mixed[0].losses[0] != plain[0].losses[0]
    assert mixed[0].losses[0] == pytest.approx(plain[0].losses[0], rel=0.03)
    expected, found = (assemble(run.grads[0] for run in runs) for runs in (plain, mixed))
    for name in (
        "out.weight",
        "body.blocks.0.attention.q_proj.weight",
        "lift.weight",
        "position",
        "body.blocks.1.mix.1.weight",
    ):
        assert found[name].dtype == torch.float32
        cosine = torch.cosine_similarity(found[name].flatten(), expected[name].flatten(), dim=0)
        assert cosine > 0.95, name


@pytest.mark.more
def test_what_is_refused(pool: RankPool) -> None:
    patterns = {
        "block in head": "network.pool is in a custom network, whose layers pipeline parallelism cannot cut unless",
        "shared layer": "body.blocks holds a layer twice",
        "tied to an end": "layer 1 of body.blocks shares a parameter with embed or head",
        "batch norm": "BatchNorm1d in network takes statistics of a whole batch",
        "no list": "pipeline_layers='bodies' of Layers names no list of layers",
        "second name": "second name for a part of a model that another pipeline stage holds",
        "length": "layers must return hidden states of the shape that they take",
        "mean over positions": "no error",
    }
    for said in pool.run(jobs_layered.refused, "pp2", list(patterns), ranks=2):
        for wrong, pattern in patterns.items():
            assert pattern in said[wrong] or (wrong == "length" and "failed on another rank" in said[wrong]), said[
                wrong
            ]
    cut = {
        "mean over positions": "layer 1 gives another result on a part of a row than on the whole",
        "batch norm": "no error",
    }
    for said in pool.run(jobs_layered.refused, "cp2", list(cut), ranks=2):
        assert all(pattern in said[wrong] for wrong, pattern in cut.items()), said


@pytest.mark.parametrize("fold", ["pp2", pytest.param("pp2 | ep2", marks=pytest.mark.slow)])
def test_errors_reach_all_ranks(pool: RankPool, fold: str) -> None:
    patterns = {
        "few rows": "no error",
        "other batch": "were given different batches",
        "embed": "the network's code failed on another rank",
        "head": "the network's code failed on another rank",
        "no tensor": "whose first tensor has an entry for each row",
        "output in training": "through which a pipeline cannot go backward",
        "no result": "head must return a loss (a scalar, the mean over rows), a pair",
        "good again": "no error",
        "few rows in evaluation": "no error",
        "placeholder": "this layer is on another pipeline stage",
    }
    world = 4 if "ep2" in fold else 2
    fails = {"embed": world // 2 - 1, "head": world - 1}  # the rank that runs it
    for rank, said in enumerate(pool.run(jobs_layered.calls, fold, ranks=world)):
        for name, pattern in patterns.items():
            if fails.get(name) == rank:
                pattern = "ZeroDivisionError"
            if name == "no result" and rank < world // 2:
                pattern = "failed on another rank"
            assert pattern in said[name], f"{name} on rank {rank}: {said[name]}"


@pytest.mark.parametrize(("fold", "first", "second"), [
    ("pp2", {"microbatches": 4, "schedule": "gpipe"}, {"microbatches": 2, "schedule": "1f1b"}),
    ("cp2", {"exchange": "ring"}, {"exchange": "all_gather"}),
])  # fmt: skip
@pytest.mark.more
def test_settings_of_a_second_trainer(pool: RankPool, fold: str, first: dict[str, Any], second: dict[str, Any]) -> None:
    """Apply as to a fresh network."""
    data = jobs_layered.make_data(2, 1, 4)
    for used, fresh in pool.run(jobs_layered.changed, fold, data, first, second, ranks=2):
        assert used[:3] == fresh[:3]
        assert all(torch.equal(weight, fresh[3][name]) for name, weight in used[3].items())
        assert all(torch.equal(*outputs) for outputs in zip(used[4], fresh[4], strict=True))

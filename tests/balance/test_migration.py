# SPDX-License-Identifier: Apache-2.0
"""A run whose experts change places after every step is the run whose experts stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_moefold import Fold
from lightning_moefold.balance.fast import ExpertCopies
from lightning_moefold.testing import RankPool, make_batches, make_checkpoint, reference_run
from lightning_moefold.testing.pieces import assemble
from tests.balance.moving import check_bits
from tests.exactness import compare, runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("moving")


def _checkpoint(folder: Path, **sizes: int) -> str:
    path = folder / "-".join(map(str, sizes.values()))
    return str(path if path.exists() else make_checkpoint(path, "qwen2_moe", vocab_size=97, **sizes))


EVEN = {"num_experts": 8, "moe_intermediate_size": 8}
#: Three experts of odd width on a rank: two edp ranks cut gate and up by rows, unevenly, and down along the next dimension.
UNEVEN = {"num_experts": 6, "moe_intermediate_size": 7}


@pytest.mark.parametrize(
    ("fold", "ranks", "sizes", "spec"),
    [
        ("tp2 | ep2", 2, EVEN, {"dispatch": {"dispatch_chunks": 2}}),
        pytest.param("| ep4", 4, EVEN, {"dispatch": {"dispatcher": "deduplicated"}}, marks=pytest.mark.more),
        pytest.param("| ep2 etp2", 4, EVEN, {"dispatch": {"dispatcher": "allgather"}}, marks=pytest.mark.more),
        pytest.param("| ep2", 4, EVEN, {"dispatch": {"capacity_factor": 1.0}}, marks=pytest.mark.more),
        ("| ep2", 4, UNEVEN, {"sharding": "full", "moves": {"exchange": 1}}),
        pytest.param(
            "| ep2", 4, EVEN, {"dispatch": {"expert_copies": ExpertCopies("greedy", max_copies_per_rank=2)}},
            marks=pytest.mark.more,
        ),
        pytest.param("| ep2", 4, EVEN, {"sharding": "none", "optimizer": "sgd"}, marks=pytest.mark.more),
        pytest.param(
            "pp2 | ep2", 4, EVEN, {"pipeline": {"pipeline_schedule": "1f1b"}, "num_microbatches": 2},
            marks=pytest.mark.more,
        ),
        pytest.param(
            "pp2 | ep2", 4, EVEN,
            {"pipeline": {"pipeline_schedule": "interleaved_zero_bubble", "num_stages_per_rank": 2}, "num_microbatches": 4,
             "layers": 4},
            marks=pytest.mark.more,
        ),
        pytest.param("cp2 | ep2", 2, UNEVEN, {"recompute": "full"}, marks=pytest.mark.more),
        pytest.param("tp2 pp2 | ep2 etp2", 8, EVEN, {"num_microbatches": 2}, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_moves_change_nothing(
    pool: RankPool, folder: Path, fold: str, ranks: int, sizes: dict[str, int], spec: dict[str, Any]
) -> None:
    """Loss, norm, every gradient and the weights after three steps are one process's; and a move keeps every bit."""
    spec = dict(spec)
    layers = spec.pop("layers", 2)
    path = _checkpoint(folder, **sizes, num_hidden_layers=layers)
    parsed = Fold.parse(fold, ranks)
    capacity = spec.get("dispatch", {}).get("capacity_factor")
    batches = make_batches(3, parsed.dp, 4, 10, 97, seed=5)
    common = {"num_microbatches": spec.get("num_microbatches", 1), "optimizer": spec.get("optimizer", "adamw")}
    spec = {"overrides": {"output_router_logits": True}, "clip": 0.5, "lr": 1e-2, "moves": {}, **common, **spec}
    if capacity is None:
        expected: Any = reference_run(path, batches, clip=0.5, config_overrides=spec["overrides"], **common)
        actual = pool.run(runs.train, path, fold, batches, spec, ranks=ranks)
        compare.compare(actual, expected, 1e-9, fold)
    else:
        stays = pool.run(runs.train, path, fold, batches, {k: v for k, v in spec.items() if k != "moves"}, ranks=ranks)
        actual = pool.run(runs.train, path, fold, batches, spec, ranks=ranks)
        assert sum(run.dropped for run in actual) == sum(run.dropped for run in stays) > 0
        assert actual[0].losses == pytest.approx(stays[0].losses, rel=1e-12)
    assert all(len(run.moves) == 3 for run in actual)
    for step in range(3):
        before, after = ([run.moves[step][i] for run in actual] for i in (0, 1))
        assert any(name.endswith(":exp_avg_sq") or name.endswith(":momentum_buffer") for name in before[0])
        assert check_bits(before, after) > 30


@pytest.mark.parametrize(
    ("fold", "ranks", "sizes"), [("| ep2", 2, EVEN), pytest.param("| ep2", 4, UNEVEN, marks=pytest.mark.more)]
)
@pytest.mark.parametrize("renumber", [False, pytest.param(True, marks=pytest.mark.more)])
def test_the_run_has_the_same_bits(
    pool: RankPool, folder: Path, fold: str, ranks: int, sizes: dict[str, int], renumber: bool
) -> None:
    path = _checkpoint(folder, **sizes, num_hidden_layers=2)
    batches = make_batches(3, ranks, 2, 10, 97, seed=7)
    spec: dict[str, Any] = {"overrides": {"output_router_logits": True}}
    stays = pool.run(runs.train, path, fold, batches, spec, ranks=ranks)
    moves = pool.run(runs.train, path, fold, batches, {**spec, "moves": {"renumber": renumber}}, ranks=ranks)
    assert moves[0].losses == stays[0].losses
    weights = [assemble(run.weights for run in ranks) for ranks in (stays, moves)]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


@pytest.mark.more
def test_state_that_is_left_behind_is_seen(pool: RankPool, folder: Path) -> None:
    """The oracle above, with one tensor of state that does not move: a planted fault."""
    path = _checkpoint(folder, **EVEN, num_hidden_layers=2)
    batches = make_batches(3, 2, 2, 10, 97, seed=7)
    stays, planted = (
        pool.run(runs.train, path, "| ep2", batches, spec, ranks=2) for spec in ({}, {"moves": {"plant": True}})
    )
    assert planted[0].losses[:2] == stays[0].losses[:2]
    assert planted[0].losses[2] != pytest.approx(stays[0].losses[2], rel=1e-9)
    with pytest.raises(AssertionError, match=r"exp_avg_sq has changed in a move"):
        check_bits([run.moves[0][0] for run in planted], [run.moves[0][1] for run in planted])

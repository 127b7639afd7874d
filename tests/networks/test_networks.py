# SPDX-License-Identifier: Apache-2.0
"""Blocks in a user's own network: every fold trains it as one process does (float64, errors below 1e-9)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_moefold import Fold
from lightning_moefold.testing import RankPool, assert_close_by_name
from lightning_moefold.testing.pieces import assemble
from tests.exactness import cover
from tests.networks import network

FACTORS: dict[str, list[Any]] = {
    "sharding": ["optimizer", "full", "none"],
    "expert": [False, True],
    "balance": [False, True],
    "accumulate": [1, 2],
    "frozen": [False, True],
    "twice": [False, True],
}
FOLDS = [
    (1, ""), (2, "tp2 | ep2"), (2, "| ep2"), (2, "tp2 | etp2"), (2, "tp2"), (2, ""), (4, "tp2 | ep4"), (4, "tp2 | ep2"),
    (4, "tp4 | ep2"), (4, "tp2 | etp2 ep2"), (4, "| ep2"), (4, "tp4 | ep4"), (4, "| etp2"), (4, "tp2 | etp4"),
    (8, "tp2 | etp2 ep2"), (8, "tp4 | ep4"),
]  # fmt: skip


def _cases() -> list[Any]:
    rows = cover.deal(cover.pairwise(FACTORS), len(FOLDS), seed=4)
    return [
        pytest.param(world, fold, {**row, "expert": row["expert"] and "etp" not in fold}, id=f"{world}-{fold}")
        for (world, fold), row in zip(FOLDS, rows, strict=True)
    ]


def check(pool: RankPool, world: int, fold: str, spec: dict[str, Any]) -> None:
    data = network.make_data(3 * spec.get("accumulate", 1), Fold.parse(fold, world).dp)
    expected = network.train_alone(data, spec)
    actual = pool.run(network.train, fold, data, spec, ranks=world)
    for rank, run in enumerate(actual):
        data_rank = Fold.parse(fold, world).coordinates(rank)["dp"]
        torch.testing.assert_close(run.losses, [step[data_rank] for step in expected.losses], rtol=1e-9, atol=0)
        assert run.balance == actual[0].balance
        torch.testing.assert_close(run.balance, expected.balance, rtol=1e-9, atol=0)
    for step, grads in enumerate(expected.grads):
        found = assemble(run.grads[step] for run in actual)
        assert_close_by_name(_unclipped(found, grads), grads, 1e-9, f"gradients of step {step}, {fold} {spec}")
    assert_close_by_name(assemble(r.weights for r in actual), expected.weights, 1e-9, f"weights, {fold} {spec}")
    for name, load_E in expected.loads.items():
        assert torch.equal(sum(run.loads[name] for run in actual), load_E), name


def _unclipped(found: dict[str, torch.Tensor], clipped: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    norm = torch.cat([g.flatten() for g in found.values()]).norm()
    assert found.keys() == clipped.keys()
    return {name: g * (0.5 / (norm + 1e-6)).clamp(max=1) for name, g in found.items()}


@pytest.mark.parametrize(("world", "fold", "spec"), _cases())
def test_a_network_under_a_fold(pool: RankPool, world: int, fold: str, spec: dict[str, Any]) -> None:
    check(pool, world, fold, spec)

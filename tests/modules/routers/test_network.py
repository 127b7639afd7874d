# SPDX-License-Identifier: Apache-2.0
"""Routers, their losses and biases in a network of a user's own (float64, errors below 1e-9)."""

from __future__ import annotations

import pytest
import torch

from lightning_moefold.testing import RankPool, assert_close_by_name
from lightning_moefold.testing.pieces import assemble
from tests.modules.routers import jobs_network


@pytest.mark.parametrize(
    ("world", "fold", "routers"),
    [
        pytest.param(2, "tp2 | ep2", "tokens", marks=pytest.mark.more),
        pytest.param(2, "| etp2", "tokens", marks=pytest.mark.more),
        (2, "| ep2", "rows"),
        *(
            pytest.param(4, fold, routers, marks=pytest.mark.slow)
            for fold in ("tp2 | ep4", "| etp2 ep2")
            for routers in ("tokens", "rows")
        ),
    ],
)
@pytest.mark.more
def test_a_network_under_a_fold(pool: RankPool, world: int, fold: str, routers: str) -> None:
    draw = torch.Generator().manual_seed(6)
    data = [torch.randn(4, 5, jobs_network.SIZE, generator=draw, dtype=torch.float64) for _ in range(4)]
    losses, weights, biases = jobs_network.train_alone(data, routers)
    actual = pool.run(jobs_network.train, fold, data, routers, ranks=world)
    assert_close_by_name(assemble(run[1] for run in actual), weights, 1e-9, "weights")
    assert all(run[2] == biases for run in actual)
    assert any(bias for layer in biases for bias in layer)
    if fold == "tp2 | ep2":  # where there is one data rank, its loss is that of all rows
        torch.testing.assert_close(actual[0][0], losses, rtol=1e-9, atol=0)
    if (fold, routers) == ("| ep2", "rows"):  # the two nodes of its first router are the two ranks
        for *_, travels in actual:
            stays, leaves = travels.tolist()
            assert stays + leaves == 4 * 2 * 5 * 3
            assert leaves <= 4 * 2 * (0.3 * 5 * 3 // 1)
        plain = pool.run(jobs_network.train, fold, data, "tokens", ranks=world)
        assert all(leaves > 4 * 2 * (0.3 * 5 * 3 // 1) for *_, (_, leaves) in plain)

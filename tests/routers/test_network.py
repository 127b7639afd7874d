# SPDX-License-Identifier: Apache-2.0
"""Routers, their losses and biases in a network of a user's own (float64, errors below 1e-9)."""

from __future__ import annotations

import pytest
import torch

from lightning_moefold.testing import RankPool, assert_close_by_name
from lightning_moefold.testing.pieces import assemble
from tests.routers import network


@pytest.mark.parametrize(
    ("world", "fold"),
    [
        (2, "tp2 | ep2"),
        (2, "| etp2"),
        *(pytest.param(4, f, marks=pytest.mark.slow) for f in ("tp2 | ep4", "| etp2 ep2")),
    ],
)
def test_a_network_under_a_fold(pool: RankPool, world: int, fold: str) -> None:
    draw = torch.Generator().manual_seed(6)
    data = [torch.randn(4, 5, network.SIZE, generator=draw, dtype=torch.float64) for _ in range(4)]
    losses, weights, biases = network.train_alone(data)
    actual = pool.run(network.train, fold, data, ranks=world)
    assert_close_by_name(assemble(pieces for _, pieces, _ in actual), weights, 1e-9, "weights")
    assert all(found == biases for _, _, found in actual)
    assert any(bias for layer in biases for bias in layer)
    if fold == "tp2 | ep2":  # where there is one data rank, its loss is that of all rows
        torch.testing.assert_close(actual[0][0], losses, rtol=1e-9, atol=0)

# SPDX-License-Identifier: Apache-2.0
"""A network of one's own in pipeline stages and over cp: trained as one process does (float64, errors below 1e-9)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_moefold import Fold
from lightning_moefold.testing import RankPool, assert_close_by_name, relative_error
from lightning_moefold.testing.pieces import assemble
from tests.networks import layered
from tests.networks.test_networks import _unclipped


def check(pool: RankPool, world: int, fold: str, spec: dict[str, Any]) -> None:
    spec = {"head": "pair", **spec}
    parsed = Fold.parse(fold, world)
    data = layered.make_data(3 * spec.get("accumulate", 1), parsed.dp, spec.get("microbatches", 2))
    expected, outputs = layered.train_alone(data, spec)
    found = pool.run(layered.train, fold, data, spec, ranks=world)
    actual = [run for run, _, _ in found]
    for rank, (run, logits, _) in enumerate(found):
        data_rank = parsed.coordinates(rank)["dp"]
        torch.testing.assert_close(run.losses, [step[data_rank] for step in expected.losses], rtol=1e-9, atol=0)
        if spec["head"] == "pair":
            assert run.losses == actual[0].losses  # bit by bit
        torch.testing.assert_close(run.balance, expected.balance, rtol=1e-9, atol=0)
        for mine, step in zip(logits, outputs, strict=True):
            assert relative_error(mine, step[data_rank]) < 1e-9
    for step, grads in enumerate(expected.grads):
        whole = assemble(run.grads[step] for run in actual)
        assert_close_by_name(_unclipped(whole, grads), grads, 1e-9, f"gradients of step {step}, {fold} {spec}")
    assert_close_by_name(assemble(r.weights for r in actual), expected.weights, 1e-9, f"weights, {fold} {spec}")
    for name, load_E in expected.loads.items():
        assert torch.equal(sum(run.loads[name] for run in actual if name in run.loads), load_E), name


def test_a(pool: RankPool) -> None:
    check(pool, 2, "pp2", {})

# SPDX-License-Identifier: Apache-2.0
"""Optimizers that take all parameters in one call, the default on CUDA, on plain tensors and DTensors of several meshes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_moefold.optim.pieces import run_on_pieces
from lightning_moefold.testing import RankPool
from tests.optim import jobs_foreach
from tests.quick import quick

FOLDS = [
    (1, "", "optimizer", "bf16-mixed"),
    (4, "tp2 | ep2", "optimizer", "64-true"),
    (2, "| etp2", "none", "64-true"),
]


@pytest.mark.parametrize(("ranks", "fold", "sharding", "precision"), quick(FOLDS, FOLDS[1]))
def test_every_optimizer_on_parameters_of_all_kinds(
    pool: RankPool, ranks: int, fold: str, sharding: str, precision: str
) -> None:
    """To the last bit or nearly what one parameter after the other gives."""
    for kinds, errors in pool.run(jobs_foreach.every_optimizer, fold, sharding, precision, ranks=ranks):
        assert kinds > 1, "the case is too easy"
        bounds = dict.fromkeys(errors, 1e-12 if precision == "64-true" else 1e-5)
        bounds["asgd"] = max(bounds["asgd"], 1e-8)  # torch keeps its rate in float32 in the one and not in the other
        assert {n: error for n, error in errors.items() if isinstance(error, str) or error > bounds[n]} == {}


@pytest.mark.parametrize(
    ("fold", "sharding", "precision", "kinds"),
    [
        ("tp2 | ep2", "optimizer", "64-true", ["one by one", "default", "fused"]),
        ("| ep2", "none", "bf16-true", ["master one by one", "master"]),
    ],
)
@pytest.mark.more
def test_runs_of_the_trainer(pool: RankPool, fold: str, sharding: str, precision: str, kinds: list[str]) -> None:
    """The strategy lets them work, with schedules, clipping, gradients set to zero, and float32 masters."""
    for errors in pool.run(jobs_foreach.runs, fold, sharding, precision, kinds, ranks=2):
        assert max(errors) <= (1e-12 if precision == "64-true" else 1e-2)


class _Noted(torch.optim.SGD):
    pass


def test_nothing_but_the_optimizer_is_changed() -> None:
    """Its class stays as it is, twice is once, a scheduler made later finds a method, and the closure runs outside."""
    module = nn.Linear(2, 2)
    optimizer, other = _Noted(module.parameters(), lr=0.1), _Noted(module.parameters(), lr=0.1)
    step = _Noted.step
    run_on_pieces(optimizer)
    first = optimizer.step
    run_on_pieces(optimizer)
    assert optimizer.step == first
    assert _Noted.step is step
    assert "step" not in vars(other)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    modes = []

    def closure() -> torch.Tensor:
        modes.append(torch._C._len_torch_dispatch_stack())
        loss = module(torch.ones(2)).sum()
        loss.backward()
        return loss

    before = module.weight.clone()
    optimizer.step(closure)
    schedule.step()
    optimizer.zero_grad(set_to_none=False)
    assert modes == [0]
    assert not torch.equal(before, module.weight)
    assert optimizer.param_groups[0]["lr"] == 0.05

# SPDX-License-Identifier: Apache-2.0
"""float32 masters of bfloat16 weights: float32 training whose forward sees rounded weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_moefold.optim import MasterWeights
from lightning_moefold.testing import RankPool, assert_close_by_name, make_checkpoint
from lightning_moefold.testing.pieces import assemble
from tests.optim import jobs_optimizers

STEPS = 4


def _by_hand(weights: dict[str, Tensor], steps: int) -> dict[str, Tensor]:
    """float32 AdamW in one process, on the gradients that the ranks draw."""
    masters = {name: nn.Parameter(weight.float()) for name, weight in weights.items()}
    optimizer = torch.optim.AdamW(masters.values(), **jobs_optimizers.MASTER_OPTIONS)
    for step in range(steps):
        for name, master in masters.items():
            master.grad = jobs_optimizers.drawn_gradient(name, tuple(master.shape), step).float()
        optimizer.step()
    return {name: master.detach() for name, master in masters.items()}


@pytest.mark.more
def test_masters_under_folds_and_resumed(pool: RankPool, tmp_path: Path) -> None:
    path = str(make_checkpoint(tmp_path / "model", "qwen3_moe", vocab_size=97, dtype=torch.bfloat16))
    full = pool.run(jobs_optimizers.masters, path, "tp2 | ep2", STEPS, str(tmp_path), ranks=4)
    expected = _by_hand(assemble(report.loaded for report in full), STEPS)
    assert expected

    def check(reports: list[jobs_optimizers.Report], what: str) -> None:
        state = assemble(report.state for report in reports)
        masters = {name.removesuffix(".master"): value for name, value in state.items() if name.endswith(".master")}
        assert_close_by_name(masters, expected, 1e-6, what)

    check(full, "without a stop")
    weights = assemble(report.weights for report in full)
    assert set(weights) == set(expected)
    assert all(weight.dtype == torch.bfloat16 for weight in weights.values())
    pool.run(jobs_optimizers.masters, path, "tp2 | ep2", 2, str(tmp_path), ranks=4)
    for ranks, fold in ((2, "| etp2"), (4, "")):
        resumed = pool.run(
            jobs_optimizers.masters, path, fold, STEPS, str(tmp_path), str(tmp_path / "2.ckpt"), ranks=ranks
        )
        check(resumed, f"resumed under {fold!r}")


class _Mixed(nn.Module):
    """Weights in bfloat16, one of them in float32, and one that gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.narrow, self.wide = nn.Linear(5, 4).bfloat16(), nn.Linear(4, 3)
        self.unused = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(self.narrow(x.bfloat16()).float()).square().mean()


def _train(module: _Mixed, optimizer: torch.optim.Optimizer, steps: int) -> None:
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for step in range(steps):
        x = torch.randn(7, 5, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        optimizer.step(lambda: module(x).backward())
        schedule.step()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adagrad, torch.optim.SGD])
def test_one_process(kind: type[torch.optim.Optimizer]) -> None:
    """Bit by bit the loop by hand: forward with rounded weights, step in float32."""
    module, other = _Mixed(), _Mixed()
    groups = [
        {"params": list(module.narrow.parameters())},
        {"params": [*module.wide.parameters(), module.unused], "lr": 0.03},
    ]
    _train(module, MasterWeights(kind, groups, lr=0.01, weight_decay=0.1), 5)
    names = dict(other.named_parameters())
    masters = {name: nn.Parameter(p.detach().float()) for name, p in names.items()}
    theirs = kind(
        [{"params": [m for n, m in masters.items() if "narrow" in n]},
         {"params": [m for n, m in masters.items() if "narrow" not in n], "lr": 0.03}], lr=0.01, weight_decay=0.1,
    )  # fmt: skip
    for step in range(5):
        other.zero_grad()
        other(torch.randn(7, 5, generator=torch.Generator().manual_seed(step))).backward()
        for name, p in names.items():
            masters[name].grad = None if p.grad is None else p.grad.float()
        theirs.step()
        for group in theirs.param_groups:
            group["lr"] *= 0.5
        with torch.no_grad():
            for name, p in names.items():
                p.copy_(masters[name])
    assert_close_by_name(dict(module.state_dict()), dict(other.state_dict()), 0.0, "weights")


def test_state_dict_keeps_every_bit() -> None:
    module = _Mixed()
    optimizer = MasterWeights(torch.optim.AdamW, module.parameters(), lr=0.01)
    _train(module, optimizer, 2)
    twin = _Mixed()
    twin.load_state_dict(module.state_dict())
    again = MasterWeights(torch.optim.AdamW, twin.parameters(), lr=0.01)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch shares step counters otherwise
    for one, two in ((module, optimizer), (twin, again)):
        _train(one, two, 3)
    assert_close_by_name(dict(twin.state_dict()), dict(module.state_dict()), 0.0, "weights")
    assert module.narrow.weight in optimizer.state
    assert "master" not in optimizer.state[module.wide.weight]


class _Counting(torch.optim.SGD):
    """Counts its steps in its groups, as optimizers without a schedule do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for group in self.param_groups:
            group["count"] = 0

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["count"] += 1
        return super().step(closure)


def test_what_an_optimizer_keeps_in_its_groups() -> None:
    module = _Mixed()
    optimizer = MasterWeights(_Counting, module.parameters(), lr=0.01)
    _train(module, optimizer, 3)
    assert [group["count"] for group in optimizer.param_groups] == [3]
    assert [group["lr"] for group in optimizer.param_groups] == [0.01 * 0.5**3]


def test_groups_cannot_be_added_later() -> None:
    optimizer = MasterWeights(torch.optim.SGD, [nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(NotImplementedError, match="when it is made"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})

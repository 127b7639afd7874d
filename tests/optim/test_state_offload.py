# SPDX-License-Identifier: Apache-2.0
"""State in host memory between steps: the same bits, no memory of its own meanwhile, and there for whoever asks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from lightning_moefold.modules import offload
from lightning_moefold.optim import MasterWeights, Muon, offload_state, state_offload

MAKE: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adamw": lambda net: torch.optim.AdamW(net.parameters(), lr=0.1),
    "sgd foreach": lambda net: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, foreach=True),
    "muon": lambda net: Muon(net.named_parameters(), adamw_lr=0.1),
    "masters": lambda net: MasterWeights(torch.optim.AdamW, net.parameters(), lr=0.1),
}


def train(name: str, offloaded: bool, steps: int = 3) -> tuple[list[Tensor], torch.optim.Optimizer, list[int]]:
    """Weights, the optimizer, and bytes of state that exist in the closure of each step."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    net = net.bfloat16() if name == "masters" else net
    optimizer = MAKE[name](net)
    if offloaded:
        assert offload_state(offload_state(optimizer)) is optimizer
    x, held = torch.randn(5, 4, dtype=next(net.parameters()).dtype), []

    def closure() -> Tensor:
        optimizer.zero_grad()
        values = (v for state in optimizer.state.values() for v in state.values())
        held.append(sum(v.untyped_storage().nbytes() for v in values if isinstance(v, Tensor) and v.numel() > 1))
        loss = net(x).square().mean()
        loss.backward()
        return loss

    for step in range(steps):
        if step == 1:
            closure()
            optimizer.step()
        else:
            optimizer.step(closure)
    return [p.detach() for p in net.parameters()], optimizer, held


@pytest.mark.parametrize("name", MAKE)
def test_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, plain, held = train(name, False)
    assert held[1] > 0
    monkeypatch.setattr(offload, "DEVICES", {"cpu"})
    found, optimizer, held = train(name, True)
    assert all(map(torch.equal, found, expected))
    assert held == [0, 0, 0]
    states: list[dict[str, Any]] = [o.state_dict()["state"] for o in (plain, optimizer)]
    for number, values in states[0].items():
        for key, value in values.items():
            assert torch.equal(states[1][number][key], torch.as_tensor(value)), key


def test_state_that_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "DEVICES", {"cpu"})
    _, optimizer, _ = train("adamw", True)
    stored = optimizer.state_dict()
    copied = {key: {k: v.clone() for k, v in values.items()} for key, values in stored["state"].items()}
    optimizer.load_state_dict({**stored, "state": copied})
    optimizer.step()
    assert len(optimizer.state) == len(copied) > 0
    assert all(values["exp_avg"].untyped_storage().nbytes() == 0 for values in optimizer.state.values())


def test_on_a_cpu_nothing_moves() -> None:
    _, optimizer, held = train("adamw", True)
    assert held[1] == held[2] > 0
    assert optimizer.state_dict()["state"]


def test_memory_is_written_when_what_is_queued_is_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """The state gets its memory on the compute stream, where kernels of backward may still use it: the copies wait for them."""
    seen = mock.MagicMock()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: seen.compute)
    monkeypatch.setattr(torch.cuda, "stream", seen.on)
    offloaded = state_offload._Offloaded(mock.Mock())
    offloaded._stream = seen.copies
    offloaded._away = [(tensor, 16, torch.empty(4)) for tensor in (seen.first, seen.second)]
    offloaded.bring()
    order = [name for name, _, _ in seen.mock_calls if name.endswith(("resize_", "copy_", "wait_stream"))]
    assert order == [
        "first.untyped_storage().resize_", "second.untyped_storage().resize_", "copies.wait_stream",
        "first.copy_", "second.copy_", "compute.wait_stream",
    ]  # fmt: skip
    assert seen.copies.wait_stream.call_args == mock.call(seen.compute)
    assert seen.compute.wait_stream.call_args == mock.call(seen.copies)

# SPDX-License-Identifier: Apache-2.0
"""Paired passes on CUDA, where autograd runs a backward on a thread of its own. Skipped where there is no CUDA device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_moefold.async_comm import Handle
from lightning_moefold.parallel.pipeline.paired_passes import take_turns

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class _Pause(torch.autograd.Function):
    """Where a flight would land."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, done: list[Any], name: str) -> Tensor:
        ctx.done, ctx.name = done, name
        done.append((name, torch.cuda.current_stream()))
        Handle.before_waiting()
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.done.append((f"{ctx.name}'", torch.cuda.current_stream()))
        Handle.before_waiting()
        return grads[0].clone(), None, None


def _forward(weight: Tensor, done: list[Any], name: str = "") -> Tensor:
    y = torch.ones(256, 512, device="cuda")
    for step in range(3):
        y = _Pause.apply(y @ weight, done, f"{name}{step}")
    return y


def test_passes_take_turns_on_one_stream() -> None:
    torch.manual_seed(0)
    first, second = (torch.randn(512, 512, device="cuda").div_(22).requires_grad_() for _ in range(2))
    done: list[Any] = []
    plain = _forward(first, [])
    _forward(second, []).sum().backward()
    expected, second.grad = second.grad, None
    with torch.cuda.stream(torch.cuda.Stream()):
        stream = torch.cuda.current_stream()
        stream.wait_stream(torch.cuda.default_stream())
        loss = _forward(second, done, "b").sum()
        done.clear()
        output = take_turns(lambda: _forward(first, done, "f"), lambda: loss.backward(), first.device)
    torch.cuda.synchronize()
    assert [name for name, _ in done] == ["f0", "b2'", "f1", "b1'", "f2", "b0'"]
    assert {used for _, used in done} == {stream}
    assert torch.equal(output, plain)
    assert expected is not None
    assert second.grad is not None
    assert torch.equal(second.grad, expected)

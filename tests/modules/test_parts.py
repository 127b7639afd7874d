# SPDX-License-Identifier: Apache-2.0
"""Stacks of experts computed part by part: gradients as of the whole, written in place."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from lightning_moefold.dispatch import ExpertRows
from lightning_moefold.modules import Experts
from lightning_moefold.modules.experts import cpu_cache
from lightning_moefold.modules.experts.stack import split_stack

COUNTS = [2, 0, 3, 1, 0, 4]


@pytest.fixture
def experts(monkeypatch: pytest.MonkeyPatch) -> Experts:
    monkeypatch.setattr(cpu_cache, "SMALLEST", 256)
    torch.manual_seed(0)
    return Experts(16, len(COUNTS), 8).double()


def _output(experts: Experts, x_AD: Tensor, sizes: list[int]) -> Tensor:
    """The experts on their rows, in parts of ``sizes`` experts."""
    outputs, first, row = [], 0, 0
    for size, *stacks in zip(sizes, *(split_stack(stack, sizes) for stack in experts.stacks()), strict=True):
        counts = COUNTS[first : first + size]
        rows = ExpertRows(None, torch.ones(sum(counts), dtype=torch.float64), torch.tensor(counts), True, counts)
        outputs.append(experts.compute(x_AD[row : row + sum(counts)], rows, stacks))
        first, row = first + size, row + sum(counts)
    return torch.cat(outputs)


def _input() -> Tensor:
    return torch.randn(sum(COUNTS), 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _loss(experts: Experts, sizes: list[int]) -> Tensor:
    return _output(experts, _input(), sizes).pow(3).sum()


def _gradients(experts: Experts, sizes: list[int]) -> list[Tensor]:
    return list(torch.autograd.grad(_loss(experts, sizes), list(experts.parameters())))


@pytest.mark.parametrize("sizes", [[3, 3], [1, 5], [2, 2, 2], [4, 1, 1]])
def test_gradients_are_those_of_the_whole(experts: Experts, sizes: list[int]) -> None:
    expected = _gradients(experts, [len(COUNTS)])
    with mock.patch.object(torch, "cat", wraps=torch.cat) as cat:
        found = _gradients(experts, sizes)
    assert cat.call_count == 1, "that of the outputs, none of gradients"
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_backward_twice(experts: Experts) -> None:
    """A second backward of the same graph does not write over what the first has given away."""
    loss = _loss(experts, [2, 4])
    first = torch.autograd.grad(loss, list(experts.parameters()), retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(2 * loss, list(experts.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
    assert all(torch.equal(2 * a, b) for a, b in zip(first, second, strict=True))


def test_a_part_used_twice(experts: Experts) -> None:
    """Its second user writes elsewhere, and autograd sums the two."""

    def loss(sizes: list[int]) -> Tensor:
        total, first = torch.zeros((), dtype=torch.float64), 0
        for size, *stacks in zip(sizes, *(split_stack(stack, sizes) for stack in experts.stacks()), strict=True):
            counts, row = COUNTS[first : first + size], sum(COUNTS[:first])
            rows = ExpertRows(None, torch.ones(sum(counts), dtype=torch.float64), torch.tensor(counts), True, counts)
            for x_AD in (_input(), _input() + 1):
                total = total + experts.compute(x_AD[row : row + sum(counts)], rows, stacks).pow(3).sum()
            first += size
        return total

    found, expected = (torch.autograd.grad(loss(s), list(experts.parameters())) for s in ([2, 4], [len(COUNTS)]))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_frozen_stacks_and_gradients_that_somebody_changes(experts: Experts) -> None:
    expected = _gradients(experts, [len(COUNTS)])
    experts.up_proj.requires_grad_(False)
    down = torch.autograd.grad(_loss(experts, [2, 4]), [experts.down_proj])[0]
    torch.testing.assert_close(down, expected[2], rtol=1e-13, atol=1e-13)
    parts = split_stack(experts.gate_proj, [2, 4])
    parts[1].register_hook(lambda grad: 3 * grad)  # elsewhere in memory
    gate = torch.autograd.grad(sum(part.square().sum() for part in parts), [experts.gate_proj])[0]
    torch.testing.assert_close(gate[:2], 2 * experts.gate_proj[:2])
    torch.testing.assert_close(gate[2:], 6 * experts.gate_proj[2:])

# SPDX-License-Identifier: Apache-2.0
"""A layer with copies of experts computes what it computes without: output, and every gradient on every rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from lightning_moefold.async_comm import Handle
from lightning_moefold.balance.copies import CopyPlan
from lightning_moefold.balance.costs import BalanceCosts
from lightning_moefold.balance.fast import ExpertCopies
from lightning_moefold.dispatch import DispatchConfig, ExpertAxes
from lightning_moefold.dispatch.registry import make_dispatcher
from lightning_moefold.modules import MoELayer
from lightning_moefold.modules.experts import copied, cpu_cache
from lightning_moefold.modules.recompute import recomputed
from tests.balance import plans, threads

EXPERTS, TOP, SIZE = 8, 3, 16


class Bottleneck(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(SIZE, 5), nn.GELU(), nn.Linear(5, SIZE))


@pytest.fixture(autouse=True)
def _doubles() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with mock.patch.object(cpu_cache, "SMALLEST", 256):
        yield
    torch.set_default_dtype(before)


def _layer(
    axes: ExpertAxes, config: DispatchConfig, expert: Any, hot: bool, frozen: tuple[str, ...], adapted: bool
) -> MoELayer:
    """The same on every rank, cut over the ranks of ep; with ``hot`` nearly all tokens go to expert 5 first."""
    generator = torch.Generator().manual_seed(5)
    kind: dict[str, Any] = {"ffn_hidden_size": 8} if expert is None else {"expert": expert}
    layer = MoELayer(SIZE, EXPERTS, TOP, shared_ffn_hidden_size=4, **kind)
    if adapted:
        layer.experts.adapt(2, 3, 0.7)
    mine = EXPERTS // axes.ep.size
    for name, parameter in list(layer.named_parameters()):
        value = torch.randn(parameter.shape, generator=generator) * 0.3
        if name.startswith("experts."):
            value = value[axes.ep.index * mine :][:mine].clone()
        owner, _, leaf = name.rpartition(".")
        layer.get_submodule(owner).register_parameter(leaf, nn.Parameter(value, not name.endswith(frozen)))
    if hot:
        with torch.no_grad():
            layer.gate.weight[5] = 0.5
    layer.dispatcher = make_dispatcher(config, EXPERTS, TOP, axes)
    return layer


def _results(
    axes: ExpertAxes,
    config: DispatchConfig,
    *,
    expert: Any = None,
    hot: bool = False,
    frozen: tuple[str, ...] = ("nothing",),
    again: bool = False,
    adapted: bool = False,
) -> tuple[dict[str, Tensor | None], MoELayer]:
    layer = _layer(axes, config, expert, hot, frozen, adapted)
    generator = torch.Generator().manual_seed(axes.ep.index)
    gradients: dict[str, Tensor | None] = {}
    outputs = []
    for tokens in (12, 3 * axes.ep.index):  # one rank has no token the second time
        x = torch.randn(tokens, SIZE, generator=generator)
        x = (x.abs() if hot else x).view(-1, 3, SIZE).requires_grad_()
        outputs.append(recomputed(layer, x) if again else layer(x))
        gradients[f"x{tokens}"] = x
    sum(y.square().sum() for y in outputs).backward()
    gradients = {name: x.grad for name, x in gradients.items()} | {n: p.grad for n, p in layer.named_parameters()}
    return gradients | {f"y{i}": y.detach() for i, y in enumerate(outputs)}, layer


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunks": {"chunks": 3},
    "dropping": {"capacity_factor": 0.8},
    "hot": {"hot": True},
    "recompute": {"again": True},
    "frozen": {"frozen": ("gate_proj", "up_proj", "down_proj")},
    "partly frozen": {"frozen": ("up_proj",)},
    "adapters": {"adapted": True, "frozen": ("gate_proj", "up_proj", "down_proj"), "hot": True},
    "adapters and weights": {"adapted": True, "again": True},
    "modules": {"expert": Bottleneck},
    "modules partly frozen": {"expert": Bottleneck, "frozen": ("bias",)},
}


def _both(size: int, copies: ExpertCopies, case: dict[str, Any]) -> float:
    """The largest relative error of a case with copies against the same without."""
    fields = {name: value for name, value in case.items() if name in ("chunks", "capacity_factor")}
    more = {name: value for name, value in case.items() if name not in fields}
    with_copies = threads.run(lambda axes: _results(axes, DispatchConfig(copies=copies, **fields), **more), size)
    without = threads.run(lambda axes: _results(axes, DispatchConfig(**fields), **more), size)
    assert with_copies[0][1].copies.copies > 0
    assert all(layer.copies == with_copies[0][1].copies for _, layer in with_copies)
    errors = []
    for (found, _), (expected, _) in zip(with_copies, without, strict=True):
        assert found.keys() == expected.keys()
        for name, b in expected.items():
            a = found[name]
            assert (a is None) == (b is None), name
            if a is not None and b is not None and b.numel():
                errors.append(((a - b).abs().max() / b.abs().max().clamp(min=1e-9)).item())
    return max(errors)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_copies_change_nothing(case: str, size: int) -> None:
    assert _both(size, ExpertCopies(plans.drawn, 3), CASES[case]) < 1e-12


def test_greedy_on_one_hot_expert() -> None:
    assert _both(4, ExpertCopies("greedy"), {"hot": True}) < 1e-12


@pytest.mark.parametrize("name", ["fastermoe_shadow", "llep", "joint"])
def test_policies_that_weigh_what_a_copy_costs(name: str) -> None:
    """Those of the registry that plan by exact counts, with prices at which copies of a hot expert pay."""
    costs = BalanceCosts(1000, 10, 500, 500, 100, 10**6, 10**6, 100, 100, parts_per_node=8)
    assert _both(4, ExpertCopies(name, 3, costs), {"hot": True}) < 1e-12


def test_turns_do_not_depend_on_the_plan() -> None:
    """Two passes on a rank take turns at waits: as often whether there are copies or not, as other ranks may have other plans."""
    turns: dict[bool, int] = {}
    for copies in (None, ExpertCopies(plans.drawn, 3)):
        with mock.patch.object(Handle, "before_waiting", turn := mock.Mock()):
            threads.run(lambda axes, copies=copies: _results(axes, DispatchConfig(copies=copies, chunks=2)), 2)
        turns[copies is None] = turn.call_count
    assert turns[True] == turns[False] > 0


# ---- planted bugs ----------------------------------------------------------------------------------------------------


def test_a_lost_gradient_of_a_copy_is_seen() -> None:
    real = copied._Lend.backward

    def forgetful(ctx: Any, *grads: Tensor) -> Any:
        return real(ctx, *grads[:-1], torch.zeros_like(grads[-1]))

    with mock.patch.object(copied._Lend, "backward", staticmethod(forgetful)):
        assert _both(2, ExpertCopies(plans.drawn, 3), {}) > 1e-3


def test_a_row_sent_to_the_wrong_copy_is_seen() -> None:
    real = CopyPlan.lent

    def mixed_up(plan: CopyPlan, rank: int) -> list[list[int]]:
        return [[(expert + 1) % plan.local_experts for expert in experts] for experts in real(plan, rank)]

    with mock.patch.object(CopyPlan, "lent", mixed_up):
        assert _both(2, ExpertCopies(plans.drawn, 3), {}) > 1e-3

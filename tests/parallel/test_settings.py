# SPDX-License-Identifier: Apache-2.0
"""Which settings may follow which on a module that has been cut, and what ranks agree on, on one rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.torch_version import TorchVersion

from lightning_moefold import comm
from lightning_moefold.agreement import agreeing
from lightning_moefold.errors import BatchError, InputError, UnsupportedFeature
from lightning_moefold.mesh import SINGLE
from lightning_moefold.parallel import PipelinePlan, Settings, Sharding
from lightning_moefold.parallel.settings import splits_backward

LOOPED = PipelinePlan("interleaved_1f1b", 2)


@pytest.mark.parametrize(("before", "after", "says"), [
    ({}, {"sharding": Sharding("full")}, "data_parallel_sharding='optimizer', which cannot change to 'full'"),
    ({"sharding": Sharding(mixed_dtype=torch.bfloat16)}, {}, "under mixed precision"),
    ({"plan": PipelinePlan("gpipe")}, {"plan": LOOPED}, "pipeline_schedule='gpipe' with num_stages_per_rank=1"),
    ({"plan": LOOPED}, {"plan": PipelinePlan("zbv")}, "change to pipeline_schedule='zbv'"),
    ({"plan": LOOPED}, {"plan": PipelinePlan("interleaved_1f1b", 3)}, "num_stages_per_rank=3"),
    ({}, {"plan": PipelinePlan(split=(1, 3))}, "pipeline_split=None, which cannot change to pipeline_split=[1, 3]"),
])  # fmt: skip
def test_what_decided_how_a_module_was_cut(before: dict[str, Any], after: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as refusal:
        Settings(**before).check_successor(Settings(**after), 2)
    assert says in str(refusal.value)
    assert str(refusal.value).endswith("give the same again, or make a new model.")


@pytest.mark.parametrize("after", [
    Settings(num_microbatches=4, expert_kernel="loop", recompute="full", exchange="ring", compiler="inductor"),
    Settings(plan=PipelinePlan("gpipe")),
])  # fmt: skip
def test_all_else_may_change(after: Settings) -> None:
    Settings().check_successor(after, 2)
    Settings(plan=LOOPED).check_successor(Settings(plan=PipelinePlan("interleaved_zero_bubble", 2)), 2)
    Settings(plan=LOOPED).check_successor(after, 1)  # one rank has no stages
    with pytest.raises(InputError, match="make a new model"):
        Settings(plan=LOOPED).check_successor(after, 2)


@pytest.mark.parametrize(("field", "value"), [
    ("num_microbatches", 0), ("expert_kernel", "abacus"), ("recompute", "never"), ("exchange", "pigeon"),
])  # fmt: skip
def test_values_that_are_not_known(field: str, value: Any) -> None:
    name = "context_parallel_exchange" if field == "exchange" else field
    with pytest.raises(InputError, match=f"{name}={value!r}"):
        Settings(**{field: value})


def test_agreeing_raises_the_error_of_its_rank() -> None:
    with pytest.raises(BatchError, match="mine"), agreeing(SINGLE, BatchError):
        raise BatchError("mine")
    with pytest.raises(ZeroDivisionError), agreeing(SINGLE, BatchError):
        raise ZeroDivisionError
    with agreeing(SINGLE):
        pass


def test_a_linear_step_goes_back_by_its_adjoint() -> None:
    matrix, x = torch.randn(3, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: comm.linear(x, lambda y: matrix @ y, lambda g: matrix.T @ g), (x,))


def test_a_torch_that_loses_gradients_in_a_split_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    zero_bubble = Settings(plan=PipelinePlan("zbv"), num_microbatches=4)
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.11.0+cu130"))
    with pytest.raises(
        UnsupportedFeature, match=r"'zbv' splits backward, in which torch 2.11.0\+cu130 loses gradients; use"
    ):
        zero_bubble.check_pipeline(2)
    zero_bubble.check_pipeline(1)
    Settings(num_microbatches=4).check_pipeline(2)
    assert not splits_backward()
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.12.0"))
    zero_bubble.check_pipeline(2)

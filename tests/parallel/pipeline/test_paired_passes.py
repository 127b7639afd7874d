# SPDX-License-Identifier: Apache-2.0
"""DualPipeV's pairs: tokens of one micro-batch travel while another one computes, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lightning_moefold import Fold
from lightning_moefold.async_comm import Handle
from lightning_moefold.parallel.pipeline.paired_passes import take_turns
from lightning_moefold.testing import RankPool, make_batches, make_checkpoint
from tests.parallel.pipeline import jobs_paired_passes

CPU = torch.device("cpu")
#: One MoE layer a stage. Each exchange is under way while the other pass computes its experts or its attention.
PAIR = [
    "F start", "B start",
    "F wait", "F experts", "F start",
    "B wait", "B experts'", "B start",
    "F wait",
    "B wait",
]  # fmt: skip


@pytest.mark.parametrize(
    ("fold", "dispatch"),
    [
        ("pp2 | ep2", {}),
        pytest.param("pp2 | ep2", {"dispatcher": "deduplicated"}, marks=pytest.mark.slow),
        pytest.param("pp2 | etp2", {"dispatcher": "allgather"}, marks=pytest.mark.slow),
        pytest.param("tp2 pp2 | ep2", {}, marks=pytest.mark.slow),
    ],
)
def test_exchanges_hide_behind_the_other_pass(
    pool: RankPool, tmp_path: Path, fold: str, dispatch: dict[str, Any]
) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", "qwen2_moe", num_experts=8, num_hidden_layers=4)
    data_ranks = Fold.parse(fold, 4).dp
    batches = make_batches(2, data_ranks, 8 // data_ranks, 7, 96, seed=3, padding="right")
    spec = {
        "dispatch": dispatch,
        "num_microbatches": 4,
        "pipeline": {"pipeline_schedule": "dualpipev"},
        "overrides": {"output_router_logits": True},
        "precision": "32-true",
    }
    seen = pool.run(jobs_paired_passes.train, str(checkpoint), fold, batches, spec, ranks=4)
    assert [one.differ for one in seen] == [[]] * 4
    assert all(one.compared > 40 for one in seen)
    assert [len(one.pairs) for one in seen] == [6] * 4
    for one in seen:
        assert one.pairs == [PAIR] * 6
        assert not any(event.startswith("B") for event in one.others)
    for some, others in ((seen[0], seen[1]), (seen[2], seen[3])):  # of one stage
        assert some.others == others.others


def _steps(name: str, steps: int, done: list[str]) -> None:
    for step in range(steps):
        done.append(f"{name}{step}")
        Handle.before_waiting()


def test_turns() -> None:
    done: list[str] = []
    assert take_turns(lambda: _steps("f", 2, done) or "result", lambda: _steps("b", 4, done), CPU) == "result"
    assert done == ["f0", "b0", "f1", "b1", "b2", "b3"]
    done.clear()
    take_turns(lambda: _steps("f", 3, done), lambda: None, CPU)
    assert done == ["f0", "f1", "f2"]
    Handle.before_waiting()  # outside, nobody waits for anybody


def test_a_forward_that_differentiates_lets_the_backward_end_first() -> None:
    done: list[str] = []

    def forward() -> None:
        _steps("f", 1, done)
        x = torch.ones((), requires_grad=True)
        torch.autograd.grad(x * 2, x)
        _steps("g", 2, done)

    take_turns(forward, lambda: _steps("b", 3, done), CPU)
    assert done == ["f0", "b0", "b1", "b2", "g0", "g1"]


@pytest.mark.parametrize("first", ["forward", "backward"])
def test_an_error_ends_both(first: str) -> None:
    done: list[str] = []

    def fails() -> None:
        done.append("fails")
        Handle.before_waiting()
        raise ZeroDivisionError(first)

    def wrapped() -> None:
        try:
            _steps("other", 9, done)
        except Exception as error:
            raise RuntimeError("as torch's stages do") from error

    with pytest.raises(ZeroDivisionError, match=first):
        take_turns(*((fails, wrapped) if first == "forward" else (wrapped, fails)), CPU)
    assert len(done) < 5


def test_backward_runs_in_the_surroundings_of_its_caller() -> None:
    weight = torch.ones(3, 3, requires_grad=True)
    output = torch.ones(2, 3) @ weight
    found: list[Any] = []

    def backward() -> None:
        found.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        output.sum().backward()

    with FlopCounterMode(display=False) as counter, torch.autocast("cpu", torch.bfloat16):
        take_turns(lambda: None, backward, CPU)
    assert found == [(True, torch.bfloat16)]
    assert counter.get_total_flops() == 2 * 2 * 3 * 3

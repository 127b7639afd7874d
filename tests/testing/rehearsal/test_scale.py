# SPDX-License-Identifier: Apache-2.0
"""One rank of a thousand: what it holds and sends is what the fold requires, and mistakes in either would show."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lightning_moefold.parallel import PipelinePlan
from lightning_moefold.parallel.gradients import GradientSum
from lightning_moefold.planner.search.models_zoo import MODELS
from lightning_moefold.testing.rehearsal.expected import expected_messages
from lightning_moefold.testing.rehearsal.planned import held, planned
from lightning_moefold.testing.rehearsal.scale import Step
from tests.quick import quick
from tests.testing.rehearsal.rehearsing import check, differences


def step_of(name: str, plan: PipelinePlan, m: int, **fields: Any) -> Step:
    return Step(replace(MODELS[name], **{"output_router_logits": True} | fields), m, 4096, plan)


@pytest.mark.parametrize(
    ("name", "fold", "rank"),
    quick(
        [("mixtral-8x22b", "tp2 pp8 | ep8", 897), ("qwen2-57b-a14b", "tp2 pp4 | ep4", 1)],
        ("qwen2-57b-a14b", "tp2 pp4 | ep4", 1),
    ),
)
def test_one_of_a_thousand(name: str, fold: str, rank: int) -> None:
    """Ranks that are the first among their data ranks, of which the planner tells."""
    step = step_of(name, PipelinePlan("gpipe"), 1)
    done = check(step, fold, 1024, rank)
    plan = planned(step, done.fold, rank)
    weights, gradients, moments, _ = held(done, expected_messages(step, done.fold, rank, done.model.layouts))
    # What is reduced is padded, what is held is not.
    assert (plan.weights, plan.optimizer) == (weights, moments)
    assert gradients == pytest.approx(plan.gradients, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [5, 2053, 4092])
@pytest.mark.parametrize(
    ("name", "fold"),
    [("mixtral-8x22b", "tp2 pp8 | ep8"), ("mixtral-8x22b", "tp2 pp8 | ep4 etp2"), ("qwen2-57b-a14b", "tp2 pp4 | ep4"),
     ("qwen2-57b-a14b", "tp2 pp4 | ep4 etp2")],
)  # fmt: skip
def test_folds_of_the_paper(name: str, fold: str, rank: int) -> None:
    check(step_of(name, PipelinePlan("1f1b"), 8), fold, 4096, rank)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "m"), [(1, 5), (1, 4), (49, 5)])
def test_peak_is_what_the_planner_says(rank: int, m: int) -> None:
    """On the first stage with more micro-batches than stages, and with as many, and on the last one with the head."""
    step = step_of("qwen2-57b-a14b", PipelinePlan("1f1b"), m)
    done = check(step, "tp2 pp4 | ep4", 64, rank)
    plan = planned(step, done.fold, rank)
    assert done.peak == pytest.approx(plan.total - plan.optimizer, rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize(
    "plan", [PipelinePlan("interleaved_1f1b", 2), PipelinePlan("interleaved_zero_bubble", 2), PipelinePlan("zbv"),
             PipelinePlan("dualpipev")], ids=lambda plan: plan.schedule,
)  # fmt: skip
def test_schedules(plan: PipelinePlan) -> None:
    step = step_of("qwen2-57b-a14b", plan, 8, output_router_logits=False, num_hidden_layers=8)
    check(step, "tp2 pp4 | ep4", 1024, 1021)


@pytest.mark.slow
def test_without_a_pipeline() -> None:
    check(step_of("qwen2-57b-a14b", PipelinePlan(), 1), "tp4 | ep4 etp4", 1024, 517)


def test_a_sum_that_is_left_out_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GradientSum, "_sum_bucket", staticmethod(lambda members, axis: None))
    # Norms and routers are replicated over tp, and each rank sees other tokens.
    config = replace(
        MODELS["qwen1.5-moe-a2.7b"], output_router_logits=True, num_hidden_layers=2, num_experts=16, vocab_size=1024
    )
    step = Step(config, 1, 64)
    _, missing, unforeseen = differences(step, "tp2 | ep4", 64, 9)
    [(message, count)] = missing.items()
    assert (message.kind, message.ranks, count) == ("all-reduce", (8, 9), 1)
    assert not unforeseen

# SPDX-License-Identifier: Apache-2.0
"""Closed forms of the schedules against the simulator."""

import json
from dataclasses import replace
from itertools import accumulate

import pytest

from lightning_moefold.errors import InputError
from lightning_moefold.fold import Fold
from lightning_moefold.parallel.pipeline.plan import SCHEDULES, PipelinePlan
from lightning_moefold.planner import MODELS, PRESETS, CostModel, Job, Plan, RoutingProfile, find_routing
from lightning_moefold.planner.cost.schedules import bubble, chunks_in_flight, legal, pipeline_layout
from lightning_moefold.planner.cost.simulate import chrome_trace, run_fixed, run_split, simulate

FORWARD, BACKWARD = 1.0, 2.25


def equal_stages(op):
    return FORWARD if op[0] == "F" else BACKWARD


@pytest.mark.parametrize("pp", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("rounds", [1, 2, 5])
@pytest.mark.parametrize(
    ("schedule", "chunks"), [("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2), ("interleaved_1f1b", 5)]
)
def test_closed_form_is_exact_for_equal_stages(schedule, chunks, pp, rounds):
    microbatches = pp * rounds
    timeline = run_fixed(schedule, pp, chunks, microbatches, equal_stages)
    whole = [FORWARD * chunks] * pp, [BACKWARD * chunks] * pp, [0.0] * pp
    expected = microbatches * chunks * (FORWARD + BACKWARD) + bubble(schedule, chunks, *whole)
    assert timeline.seconds == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("microbatches", [1, 2, 7])
def test_closed_form_is_exact_with_fewer_microbatches_than_stages(microbatches):
    timeline = run_fixed("1f1b", 4, 1, microbatches, equal_stages)
    assert timeline.seconds == pytest.approx((microbatches + 3) * (FORWARD + BACKWARD))


@pytest.mark.parametrize(("schedule", "chunks"), [("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 3)])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_chunks_in_flight_are_those_of_the_simulator(schedule, chunks, rank):
    events = [e for e in run_fixed(schedule, 4, chunks, 8, equal_stages).events if e.rank == rank]
    held = accumulate(1 if e.op[0] == "F" else -1 for e in sorted(events, key=lambda e: e.start))
    assert max(held) == chunks_in_flight(schedule, 4, chunks, 8, rank)


def test_a_slow_stage_sets_the_pace():
    """With unequal stages the closed form is: the slowest always busy, the others once."""
    cost = {0: 1.0, 1: 3.0, 2: 1.5}
    timeline = run_fixed("1f1b", 3, 1, 12, lambda op: cost[op[1]] * (1 if op[0] == "F" else 2))
    forward = list(cost.values())
    expected = 12 * 9.0 + bubble("1f1b", 1, forward, [2 * f for f in forward], [0.0] * 3)
    assert timeline.seconds == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("schedule", "chunks"), [("zbv", 2), ("dualpipev", 2), ("interleaved_zero_bubble", 2)])
def test_split_backward_waits_less_than_1f1b(schedule, chunks):
    part = {"F": 1.0, "B": 1.0, "W": 1.0}
    timeline = run_split(schedule, 4, chunks, 16, lambda op: part[op[0]])
    busy = 16 * chunks * 3.0
    waits = timeline.seconds - busy
    assert waits < 3 * 3.0 * chunks  # 1F1B: (p-1)(F+B)
    assert len(timeline.events) == 4 * 16 * chunks * 3
    predicted = busy + bubble(schedule, chunks, [chunks * 1.0] * 4, [chunks * 2.0] * 4, [chunks * 1.0] * 4)
    assert timeline.seconds == pytest.approx(predicted, rel=0.12)


def test_every_schedule_has_formulas_of_its_own():
    """Told by the costs of a pipeline whose stages are unequal, and by the chunks that its first rank holds."""
    costs = [3.0, 2.0, 2.5], [6.0, 4.0, 5.0], [1.0, 0.5, 0.25]
    found = {name: (bubble(name, 2, *costs), chunks_in_flight(name, 3, 2, 9, 0)) for name in SCHEDULES}
    assert len(set(found.values())) == len(SCHEDULES)


@pytest.mark.parametrize("function", [bubble, chunks_in_flight])
def test_an_unknown_schedule_has_none(function):
    arguments = ([1.0] * 4,) * 3 if function is bubble else (4, 8, 0)
    with pytest.raises(InputError, match="no formulas for pipeline_schedule='another'"):
        function("another", 2, *arguments)


def test_layers_and_ends_are_all_held():
    model = MODELS["qwen3-235b-a22b"]
    for schedule, chunks in (("1f1b", 1), ("interleaved_1f1b", 2), ("zbv", 2)):
        layout = pipeline_layout(model, 8, chunks, schedule)
        assert sum(rank.layers for rank in layout) == 94
        assert sum(rank.first for rank in layout) == sum(rank.last for rank in layout) == 1
    assert pipeline_layout(model, 8, 2, "zbv")[0].last  # the V ends where it began


def test_stages_are_the_strategys():
    """Layers lie where the strategy puts them, the head weighed in."""
    model = MODELS["qwen2-57b-a14b"]
    for schedule, chunks in (("1f1b", 1), ("zbv", 2), ("interleaved_1f1b", 3)):
        plan = PipelinePlan(schedule, chunks)
        stages = plan.layers(model, 4)
        held = [sum(len(stages[stage]) for stage in plan.local_stages(4, rank)) for rank in range(4)]
        assert [rank.layers for rank in pipeline_layout(model, 4, chunks, schedule)] == held


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("interleaved_1f1b", 4, 2, 6, "optimizer"), "multiples of pp=4"),
        (("zbv", 4, 2, 8, "full"), "sharding='full'"),
        (("zbv", 4, 2, 8, "optimizer", "full"), "recompute=None"),
        (("1f1b", 4, 1, 3, "full"), "too few"),
        (("dualpipev", 4, 2, 7, "none"), "use at least 8"),
        (("zbv", 32, 2, 64, "none"), "more than the 32 layers"),
    ],
)
def test_refusals_are_the_strategys(arguments, reason):
    schedule, pp, chunks, microbatches, *rest = arguments
    assert reason in legal(schedule, pp, chunks, microbatches, MODELS["mixtral-8x7b"], *rest)


def test_what_is_legal():
    assert legal("1f1b", 4, 1, 4, MODELS["mixtral-8x7b"], "full", "full") is None
    tied = replace(MODELS["mixtral-8x7b"], tie_word_embeddings=True)
    assert "tied" in legal("zbv", 4, 2, 8, tied, "none")


def test_simulated_plan_is_near_the_prediction_and_draws_a_trace():
    job = Job(MODELS["mixtral-8x22b"], 128, PRESETS["dgx-h100"], 256, 4096, capacity_factor=1.0)
    plan = Plan(Fold.parse("tp2 pp8 | ep8", 128), schedule="interleaved_1f1b", num_stages_per_rank=7)
    predicted = CostModel(job).estimate(plan)
    timeline = simulate(job, plan)
    assert timeline.seconds == pytest.approx(predicted.step_time, rel=0.1)
    skewed = simulate(Job(**{**vars_of(job), "capacity_factor": None, "routing": find_routing("skewed")}), plan)
    assert skewed.seconds > 1.3 * timeline.seconds
    events = json.loads(chrome_trace(timeline))["traceEvents"]
    assert sum(e["ph"] == "X" for e in events) == len(timeline.events) == 8 * 7 * 32 * 2


@pytest.mark.parametrize(("schedule", "chunks"), [("1f1b", 1), ("interleaved_1f1b", 2)])
def test_simulating_a_trace_agrees_with_the_closed_form(schedule, chunks):
    """To rounding where it is exact: equal stages, free messages, layers of one load; slower where layers differ."""
    links = replace(PRESETS["dgx-h100"].inter, bandwidth=1e30, latency=0.0)
    machine = replace(
        PRESETS["dgx-h100"], inter=links, intra=links, kernels=replace(PRESETS["dgx-h100"].kernels, collective=0.0)
    )
    model = replace(MODELS["mixtral-8x7b"], vocab_size=1)
    uneven = (0.25, 0.25, *(1 / 12,) * 6)
    plan = Plan(Fold.parse("pp4 | ep8", 64), schedule=schedule, num_stages_per_rank=chunks)
    alike, mixed = (uneven,) * 32, (uneven, (1 / 8,) * 8) * 16
    seconds = {}
    for name, shares in (("alike", alike), ("mixed", mixed)):
        job = Job(model, 64, machine, 256, 4096, routing=RoutingProfile(name, shares=shares))
        costs = CostModel(job)
        ranks = costs.ranks(plan)
        slowest = max(r.forward + r.backward for r in ranks)
        times = [[getattr(r, way) for r in ranks] for way in ("forward", "backward")]
        closed = plan.num_microbatches(job) * slowest + bubble(schedule, chunks, *times, [0.0] * 4)
        seconds[name] = simulate(job, plan).seconds / closed
    assert seconds["alike"] == pytest.approx(1, rel=2e-3)  # but for the ends, which one token of vocabulary leaves
    assert 1 < seconds["mixed"] < 1.2


def vars_of(job):
    return {name: getattr(job, name) for name in job.__dataclass_fields__}

# SPDX-License-Identifier: Apache-2.0
"""The search against brute force, its promises, and its speed."""

import time
from dataclasses import replace

import pytest

from lightning_moefold.errors import FoldError
from lightning_moefold.fold import Fold
from lightning_moefold.planner import MODELS, PRESETS, Job, PlanError, Planner, Space, find_routing
from lightning_moefold.planner.report.advice import hints, why_not
from lightning_moefold.planner.search.robust import evaluate, search
from lightning_moefold.planner.search.space import legal_folds
from tests.quick import quick


def job_for(model, ranks, batch=256, **changes):
    return Job(MODELS[model], ranks, PRESETS["dgx-h100"], batch, 4096, **changes)


@pytest.mark.parametrize(("model", "ranks"), [("qwen1.5-moe-a2.7b", 12), ("mixtral-8x7b", 16), ("qwen3-30b-a3b", 8)])
def test_folds_are_those_of_the_fold_module(model, ranks):
    job = job_for(model, ranks, batch=48)
    legal = [f for f in Fold.enumerate(ranks, job.model) if 48 % f.dp == 0]
    assert sorted(map(str, legal_folds(job))) == sorted(map(str, legal))


@pytest.mark.parametrize("sharding", ["optimizer", "full"])
@pytest.mark.more
def test_bounds_lose_nothing(sharding):
    job = job_for("qwen2-57b-a14b", 32, batch=64, sharding=sharding)
    planner = Planner(job)
    brute = []
    for fold in legal_folds(job):
        try:
            brute.append(planner.evaluate(fold)[0])
        except (FoldError, PlanError):
            continue
    brute = sorted((e for e in brute if e.fits), key=lambda e: e.step_time)
    assert len(brute) >= 5
    found = Planner(job).search(keep=5).plans
    assert [e.step_time for e in found[:5]] == [e.step_time for e in brute[:5]]


@pytest.mark.parametrize("fold", ["tp2 pp4 | ep8", "tp4 cp2 pp2 | ep4", "pp8 | ep4", "tp2 | ep8"])
def test_the_bubble_of_equal_stages_is_a_lower_bound(fold):
    """A schedule is left out by its least bubble; the best of all schedules and dispatchers is found all the same."""
    job = job_for("qwen2-57b-a14b", 32, batch=64)
    planner = Planner(job, Space(dispatchers=job.dispatchers))
    fold = Fold.parse(fold, 32)
    for size in (1, 2):
        every = []
        for dispatcher in job.dispatchers:
            bound = planner.costs.lower_bound(fold, size, dispatcher)
            for ladder in planner.plans(fold, size, dispatcher):
                estimate = planner.costs.estimate(ladder[0])
                assert bound + planner.costs.least_bubble(ladder[0], bound) <= estimate.step_time * (1 + 1e-9)
                every.append(planner._first_that_fits(ladder, False))
        fits = [e.step_time for e in every if e.fits]
        found = planner.best(fold, size)[0]
        assert found.step_time == min(fits) if fits else not found.fits


def test_plain_expert_parallelism_is_always_there():
    result = Planner(job_for("mixtral-8x7b", 64)).search(keep=2)
    assert result.plain is not None
    fold = result.plain.plan.fold
    assert (fold.tp, fold.cp, fold.pp, fold.etp) == (1, 1, 1, 1)
    if result.plain.fits:
        assert result.plain.plan.fold in [e.plan.fold for e in result.plans]
        assert result.best.step_time <= result.plain.step_time


@pytest.mark.more
def test_skew_makes_ep_smaller():
    """SmartMoE's pattern, and the pool: more skew, smaller ep."""
    result = search(job_for("qwen2-57b-a14b", 64), keep=1)
    assert set(result.pool) == {"balanced", "mild", "skewed"}
    assert result.pool["skewed"].plan.fold.ep < result.pool["balanced"].plan.fold.ep


def test_plans_are_ranked_and_their_times_add_up():
    result = Planner(job_for("qwen3-30b-a3b", 64, capacity_factor=1.0)).search(keep=8)
    times = [e.step_time for e in result.plans]
    assert times == sorted(times)
    for estimate in result.plans:
        assert sum(estimate.times.values()) == pytest.approx(estimate.step_time)
        assert sum(estimate.bounds.values()) == pytest.approx(estimate.step_time)
        assert 0 < estimate.mfu < 1
        assert estimate.fits


def test_nothing_fits_says_why_and_what_would_help():
    job = job_for("qwen3-235b-a22b", 8, batch=8)
    result = Planner(job).search()
    assert not result.best.fits
    assert result.best.bound_by == "memory"
    lines = why_not(result, Space())
    assert "No plan fits" in lines[0]
    assert any("ranks" in line for line in lines[1:])


def test_a_faster_setting_of_the_same_fold_is_named():
    """Full sharding gathers weights for every micro-batch: one of a single sequence is the published way, not the best."""
    job = job_for("mixtral-8x22b", 128, sharding="full", capacity_factor=1.0)
    space, fold = Space(micro_batch_sizes=(1,)), Fold.parse("tp8 | etp8", 128)
    result = evaluate(job, fold, space)
    assert [e.plan.micro_batch_size for e in result.plans] == [1]
    assert any("The same fold is faster as" in line for line in hints(result, space, fold))


@pytest.mark.more
def test_the_first_plan_is_best_over_the_routing_profiles():
    """The mean of the steps under all three, against brute force; a plan that does not fit under one counts twice there."""
    job = job_for("mixtral-8x7b", 8, batch=16, precision="bf16-true")
    job = replace(job, sequence_length=16384)
    space = Space(dispatchers=("alltoall", "deduplicated"), shardings=("optimizer", "full"))
    result = search(job, space, keep=10)
    assert [e.score for e in result.plans[:10]] == sorted(e.score for e in result.plans[:10])
    scores = []
    for fold in legal_folds(job):
        try:
            scores += [e.score for e in evaluate(job, fold, space).plans if e.fits]
        except (FoldError, PlanError):
            continue
    assert result.best.score == pytest.approx(min(scores))
    assert all(e.fits for e in result.best.under.values())
    fastest = result.pool["balanced"]
    assert fastest.step_time <= result.best.step_time
    assert fastest.score == pytest.approx(sum(e.step_time * (1 if e.fits else 2) for e in fastest.under.values()) / 3)


@pytest.mark.more
def test_dropped_tokens_make_uneven_routing_less_work():
    """Bounds of balanced routing are then none of other profiles, whose fastest plans were missed."""
    job, space = job_for("mixtral-8x7b", 32, batch=64, capacity_factor=1.0), Space(shardings=("optimizer",))
    pool = search(job, space, keep=5).pool
    assert len(pool) > 1
    for name, best in pool.items():
        alone = Planner(job.with_routing(find_routing(name)), space).search(keep=1).best
        assert best.under[name].step_time <= alone.step_time * (1 + 1e-9)


def test_one_given_profile_ranks_alone():
    result = search(job_for("qwen2-57b-a14b", 16, batch=32, routing=find_routing("mild")), keep=3)
    assert list(result.best.under) == ["mild"]
    assert [e.step_time for e in result.plans] == sorted(e.step_time for e in result.plans)


def test_errors_name_the_way_out():
    planner = Planner(job_for("mixtral-8x22b", 128, batch=24))
    with pytest.raises(PlanError, match="multiple of 128"):
        planner.evaluate(Fold.parse("ep8", 128))
    with pytest.raises(FoldError, match="num_experts=8"):
        planner.evaluate(Fold.parse("tp8 pp2 | ep64", 128))
    with pytest.raises(PlanError, match="no legal fold"):
        Planner(job_for("qwen1.5-moe-a2.7b", 7919, batch=6)).search()
    with pytest.raises(PlanError, match="sharding"):
        job_for("mixtral-8x7b", 8, sharding="zero3")


@pytest.mark.parametrize("change", [{"inter": 2.0}, {"memory": 2.0}])
@pytest.mark.more
def test_a_better_machine_is_never_worse(change):
    job = job_for("mixtral-8x22b", 64)
    machine = job.hardware
    if "inter" in change:
        machine = replace(machine, inter=replace(machine.inter, bandwidth=2 * machine.inter.bandwidth))
    else:
        machine = replace(machine, memory_bytes=2 * machine.memory_bytes)
    better = Planner(replace(job, hardware=machine)).search(keep=1).best
    assert better.step_time <= Planner(job).search(keep=1).best.step_time


def test_load_slows_a_plan_down():
    fold = Fold.parse("tp2 pp4 | ep8", 64)
    times = []
    for routing in ("balanced", "mild", "skewed"):
        planner = Planner(job_for("qwen2-57b-a14b", 64, routing=find_routing(routing)), Space(recomputes=("none",)))
        times.append(planner.evaluate(fold)[0].step_time)
    assert times == sorted(times)
    assert times[2] > 1.3 * times[0]


@pytest.mark.parametrize(("ranks", "seconds"), quick([(1024, 12), (16384, 40)], (1024, 12)))
@pytest.mark.more
def test_large_searches_are_fast(ranks, seconds):
    """2 and 4 CPU seconds where nothing else runs; the limits allow for a loaded machine."""
    started = time.process_time()
    result = Planner(job_for("qwen3-235b-a22b", ranks, batch=ranks)).search()
    assert result.best.fits
    assert time.process_time() - started < seconds


def test_an_adapter_is_planned_as_its_training_runs():
    """No gradients and no states of the frozen model, two products of three, and the adapter's own numbers in float32."""
    fold, space = Fold.parse("tp2 | ep4", 8), Space(recomputes=("none",), offloads=("none",))
    full, lora = (
        evaluate(job_for("mixtral-8x7b", 8, batch=16, lora_rank=rank), fold, space).best for rank in (None, 16)
    )
    narrow = evaluate(job_for("mixtral-8x7b", 8, batch=16, lora_rank=16, precision="bf16-true"), fold, space)
    assert narrow.best.memory.optimizer == lora.memory.optimizer
    assert narrow.best.memory.gradients == lora.memory.gradients
    assert narrow.best.memory.weights < 0.8 * lora.memory.weights
    assert not any("lost" in hint for hint in hints(narrow, space, fold))
    assert lora.memory.optimizer < 0.01 * full.memory.optimizer
    assert lora.memory.gradients < 0.01 * full.memory.gradients
    assert lora.times["experts"] == pytest.approx(2 / 3 * full.times["experts"])
    assert lora.job.model_flops < 0.75 * full.job.model_flops
    assert lora.step_time < full.step_time


def test_master_weights_cost_their_memory():
    """bf16-true holds 2 + 2 + 4 bytes of a number on its rank, and 8 more with float32 masters and moments."""
    fold = Fold.parse("ep8", 8)
    plain, masters = (
        evaluate(
            job_for("mixtral-8x7b", 8, batch=8, precision="bf16-true", master_weights=on),
            fold,
            Space(offloads=("none",)),
        ).best
        for on in (False, True)
    )
    assert masters.memory.optimizer == 3 * plain.memory.optimizer
    assert any("updates" in line for line in hints(search(plain.job, keep=1), Space()))
    with pytest.raises(PlanError, match="bf16-mixed stores none"):
        job_for("mixtral-8x7b", 8, master_weights=True)


@pytest.mark.more
def test_the_same_job_on_more_ranks():
    """One, two, eight and sixteen GPUs: more ranks are never slower, and one rank has nothing to shard or to exchange."""
    job = Job(MODELS["qwen1.5-moe-a2.7b"], 1, PRESETS["dgx-h200"], 16, 2048, "bf16-true")
    space = Space(dispatchers=job.dispatchers, shardings=("optimizer", "full"))
    times = []
    for ranks in (1, 2, 8, 16):
        best = search(replace(job, world_size=ranks), space, keep=1).best
        assert best.fits
        if ranks == 1:
            assert (best.job.sharding, best.plan.dispatcher) == ("optimizer", "alltoall")
        times.append(best.score)
    assert times == sorted(times, reverse=True)

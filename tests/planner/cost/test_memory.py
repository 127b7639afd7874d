# SPDX-License-Identifier: Apache-2.0
"""Parameters per rank against the model's own lists of shapes; laws of the memory model."""

from dataclasses import replace

import pytest

from lightning_moefold.fold import Fold
from lightning_moefold.models.names import parameter_entries
from lightning_moefold.planner import MODELS, PRESETS, CostModel, Job, Plan
from lightning_moefold.planner.cost.schedules import pipeline_layout
from lightning_moefold.planner.report.explain import header


def costs(model, **changes):
    values = {"model": MODELS[model], "world_size": 64, "hardware": PRESETS["dgx-h100"], "global_batch_size": 256}
    return CostModel(Job(**{**values, "sequence_length": 4096, **changes}))


@pytest.mark.parametrize("model", MODELS)
def test_parameters_of_one_rank_are_those_of_the_model(model):
    config = MODELS[model]
    whole = pipeline_layout(config, 1, 1, "1f1b")[0]
    held = costs(model).memory.parameters(1, 1, 1, whole)
    numbers = {}
    for name, entry in parameter_entries(config).items():
        size = 1
        for side in entry.shape:
            size *= side
        family = "expert" if ".experts." in name else "dense"
        numbers[family] = numbers.get(family, 0) + size
    assert (held.dense, held.expert) == (numbers["dense"], numbers["expert"])
    assert held.dense + held.expert == config.num_parameters()


@pytest.mark.parametrize(("model", "billions"), [
    ("mixtral-8x7b", 46.7), ("mixtral-8x22b", 140.6), ("qwen1.5-moe-a2.7b", 14.3), ("qwen2-57b-a14b", 57.4),
    ("qwen3-30b-a3b", 30.5), ("qwen3-235b-a22b", 235.1),
])  # fmt: skip
def test_known_models_have_their_published_size(model, billions):
    assert MODELS[model].num_parameters() / 1e9 == pytest.approx(billions, abs=0.06)


def test_cut_parameters_add_up():
    """tp, ep and etp divide what they cut: experts exactly, dense up to what is replicated."""
    memory, config = costs("mixtral-8x22b").memory, MODELS["mixtral-8x22b"]
    layers = pipeline_layout(config, 1, 1, "1f1b")[0]
    whole = memory.parameters(1, 1, 1, layers)
    cut = memory.parameters(4, 4, 2, layers)
    assert cut.expert * 8 == whole.expert
    replicated = 2 * config.hidden_size * 56 + config.hidden_size * (8 * 56 + 1)  # norms and routers
    assert (cut.dense - replicated) * 4 == whole.dense - replicated


def test_stages_add_up():
    memory, config = costs("qwen2-57b-a14b").memory, MODELS["qwen2-57b-a14b"]
    parts = [memory.parameters(1, 1, 1, held) for held in pipeline_layout(config, 4, 1, "1f1b")]
    assert sum(p.dense + p.expert for p in parts) == config.num_parameters()


def test_more_of_each_dimension_needs_less_of_what_it_cuts():
    model = costs("mixtral-8x7b")
    base = model.memory.estimate(Plan(Fold.parse("tp1 | ep1", 64)))
    by = {text: model.memory.estimate(Plan(Fold.parse(text, 64))) for text in ("tp2", "cp2", "pp2", "ep2", "etp2")}
    assert by["tp2"].activations < base.activations
    assert by["cp2"].activations < 0.6 * base.activations
    assert by["ep2"].weights < base.weights
    assert by["etp2"].weights < base.weights
    assert by["pp2"].weights < 0.6 * base.weights


def test_sharding_and_recomputation_save_memory():
    plan = Plan(Fold.parse("tp2 | ep8", 64))
    states = {}
    for sharding in ("none", "optimizer", "full"):
        memory = costs("mixtral-8x7b", sharding=sharding, precision="32-true").memory.estimate(plan)
        states[sharding] = memory.weights + memory.gradients + memory.optimizer
    assert states["full"] < states["optimizer"] < states["none"]
    model = costs("mixtral-8x7b")
    saved = [model.memory.estimate(replace(plan, recompute=r)).total for r in ("none", "selective", "full")]
    assert saved == sorted(saved, reverse=True)


def test_parts_cost_what_they_save():
    """More parts keep fewer bytes and repeat more seconds; all of them together are as slow as the whole layer."""
    model, plan = costs("qwen3-235b-a22b"), Plan(Fold.parse("tp2 pp4 | ep16", 64))
    ladder = ["none", "norm", "norm,expert_activation", "norm,moe", "attention,moe"]
    found = [model.estimate(replace(plan, recompute=r)) for r in ladder]
    assert [e.memory.activations for e in found] == sorted((e.memory.activations for e in found), reverse=True)
    again = [e.times.get("recompute", 0.0) for e in found]
    assert again == sorted(set(again))
    assert again[0] == 0
    full = model.estimate(replace(plan, recompute="full"))
    assert again[-1] == pytest.approx(full.times["recompute"])
    assert full.memory.activations < found[-1].memory.activations


def test_a_cpu_under_another_name_has_the_logits_of_a_cpu():
    """A machine that was measured is called what its owner calls it; chunks are of the kind of device."""
    fold, cpu = Fold.parse("tp2 pp2 | ep8", 64), PRESETS["cpu"]
    by = [costs("mixtral-8x7b", hardware=h).memory._loss(fold, 8192)[0] for h in (cpu, replace(cpu, name="box"))]
    assert by[0] == by[1]
    assert by[0] < costs("mixtral-8x7b", hardware=replace(cpu, device="cuda")).memory._loss(fold, 8192)[0]
    assert "64 CPU ranks (8 nodes of box)" in header(costs("mixtral-8x7b", hardware=replace(cpu, name="box")).job)


def test_states_by_hand():
    """bf16-mixed with optimizer sharding: 2 bytes of weight, 4 of gradient, 12 / ranks of weight and moments.

    Routers compute in float32: 2 bytes more.
    """
    model = costs("mixtral-8x22b", world_size=128)
    fold = Fold.parse("tp2 pp8 | ep8", 128)
    held = pipeline_layout(MODELS["mixtral-8x22b"], 8, 1, "1f1b")[1]
    local = model.memory.parameters(2, 8, 1, held)
    total = sum(model.memory.states(fold, held, accumulates=True))
    states = 6 * (local.dense + local.expert) + 12 * (local.dense / 8 + local.expert / 2)
    assert total == pytest.approx(states + 2 * 7 * 8 * 6144)


def test_gathered_weights_are_padded_to_equal_pieces():
    """Over 256 data ranks, the 8 rows of a router are gathered as 256, and whole gradients are not padded."""
    memory, config = costs("mixtral-8x22b", world_size=4096).memory, MODELS["mixtral-8x22b"]
    fold, held = Fold.parse("tp2 pp8 | ep8", 4096), pipeline_layout(config, 8, 1, "1f1b")[1]
    local = memory.parameters(2, 8, 1, held)
    weights, gradients, _ = memory.states(fold, held, accumulates=True)
    dense, expert = memory.shards(2, 8, 1, held, 256, 64)
    routers = 7 * 256 * 6144
    # All else divides by 256 or 64.
    assert 256 * dense == local.dense + routers - 7 * 8 * 6144
    assert 64 * expert == local.expert
    gathered = 2 * (local.dense - 7 * 8 * 6144 + local.expert) + 4 * routers
    assert weights == pytest.approx(4 * (dense + expert) + gathered)
    assert gradients == 4 * (local.dense + local.expert)


def test_copies_of_experts_are_kept_for_backward():
    plain, copied = (costs("mixtral-8x7b", copies_per_rank=n).memory for n in (0, 2))
    config = MODELS["mixtral-8x7b"]
    expert = 3 * config.hidden_size * config.moe_intermediate_size * 2  # bytes, in bfloat16
    for fold, copies in (("| ep8", 2), ("", 0)):
        plan = Plan(Fold.parse(fold, 64))
        more = copied.estimate(plan).activations - plain.estimate(plan).activations
        assert more == pytest.approx(copies * expert * config.num_hidden_layers)

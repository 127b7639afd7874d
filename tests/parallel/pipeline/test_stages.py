# SPDX-License-Identifier: Apache-2.0
"""How layers are cut into stages, and which schedules are legal."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as draw

from lightning_moefold import MoEConfig
from lightning_moefold.parallel.pipeline.plan import SCHEDULES, PipelinePlan, cut_by_cost


@settings(deadline=None)
@given(draw.lists(draw.integers(1, 9), min_size=1, max_size=6), draw.integers(1, 6), draw.integers(0, 20))
def test_the_slowest_stage_is_as_fast_as_can_be(costs: list[int], stages: int, head: int) -> None:
    stages = min(stages, len(costs))

    def slowest(split: tuple[int, ...]) -> int:
        ends = list(itertools.accumulate(split))
        sums = [sum(costs[end - size : end]) for end, size in zip(ends, split, strict=True)]
        return max([*sums[:-1], sums[-1] + head])

    split = cut_by_cost(costs, stages, head)
    assert len(split) == stages
    assert sum(split) == len(costs)
    assert min(split) >= 1
    every = [s for s in itertools.product(range(1, len(costs) + 1), repeat=stages) if sum(s) == len(costs)]
    assert slowest(split) == min(map(slowest, every))


def _config(layers: int, **fields: Any) -> MoEConfig:
    return MoEConfig.from_hf(
        {
            "model_type": "qwen3_moe",
            "architectures": ["Qwen3MoeForCausalLM"],
            "vocab_size": 1000,
            "hidden_size": 64,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "intermediate_size": 512,
            **fields,
        }  # fmt: skip
    )


def test_head_dense_and_moe_layers_weigh_differently() -> None:
    # Every layer is alike: only the head, which weighs two and a half of them, makes the last stage shorter.
    assert [len(part) for part in PipelinePlan().layers(_config(6), 2)] == [4, 2]
    # A dense layer of this width weighs four times as much as one of experts.
    dense = PipelinePlan().layers(_config(8, mlp_only_layers=[0, 1], vocab_size=10), 2)
    assert [len(part) for part in dense] == [2, 6]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_stage_has_one_rank(schedule: str) -> None:
    plan = PipelinePlan(schedule, 2 if schedule.startswith("interleaved") else 1)
    held = [plan.local_stages(4, rank) for rank in range(4)]
    assert sorted(itertools.chain(*held)) == list(range(4 * plan.chunks))
    assert held[0][0] == 0
    assert held[0] == ([0] if plan.chunks == 1 else [0, 7] if schedule in ("zbv", "dualpipev") else [0, 4])


REFUSED: list[tuple[dict[str, Any], int, str, str]] = [
    ({"schedule": "chimera"}, 8, "optimizer", "use 'gpipe' or '1f1b'"),
    ({"schedule": "1f1b"}, 3, "optimizer", "use at least 4, or 'gpipe'"),
    ({"schedule": "1f1b", "stages_per_rank": 2}, 8, "optimizer", "use 'interleaved_1f1b'"),
    ({"schedule": "interleaved_1f1b"}, 8, "optimizer", "use 2 or more"),
    ({"schedule": "interleaved_1f1b", "stages_per_rank": 2}, 9, "optimizer", "use a multiple of 4"),
    ({"schedule": "zbv", "stages_per_rank": 3}, 8, "optimizer", "use 2"),
    ({"schedule": "zbv"}, 8, "full", "use data_parallel_sharding='optimizer'"),
    ({"schedule": "dualpipev"}, 7, "optimizer", "use at least 8"),
    ({"split": (1, 2)}, 8, "optimizer", "give one number of layers for each"),
    ({"split": (1, 2, 0, 1)}, 8, "optimizer", "give each at least one"),
]


@pytest.mark.parametrize(("plan", "microbatches", "sharding", "hint"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_run_is_refused(plan: dict[str, Any], microbatches: int, sharding: str, hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        PipelinePlan(**plan).check(4, microbatches, sharding)


LEAST = {"gpipe": 1, "1f1b": 4, "interleaved_1f1b": 1, "interleaved_zero_bubble": 1, "zbv": 1, "dualpipev": 8}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_least_number_of_micro_batches_runs(schedule: str) -> None:
    """``test_p2p_order`` plays each schedule with every number that is accepted."""
    plan = PipelinePlan(schedule, 2 if schedule.startswith("interleaved") else 1)
    assert plan.least_microbatches(4) == LEAST[schedule]
    plan.check(4, LEAST[schedule], "optimizer")
    if LEAST[schedule] > 1:
        with pytest.raises(ValueError, match=f"use at least {LEAST[schedule]}"):
            plan.check(4, LEAST[schedule] - 1, "optimizer")
    told = f"needs num_microbatches; '{schedule}' runs with {LEAST[schedule]} or more, and 8 or more keep ranks busy"
    assert told in str(plan.needs_microbatches(4))


def test_what_splits_backward_cannot_recompute() -> None:
    PipelinePlan("1f1b").check(4, 8, "optimizer", "full")
    with pytest.raises(ValueError, match="use recompute=None"):
        PipelinePlan("zbv").check(4, 8, "optimizer", "selective")


def test_cuts_that_do_not_suit_the_model() -> None:
    with pytest.raises(ValueError, match="more than num_hidden_layers=7"):
        PipelinePlan("zbv").layers(_config(7), 4)
    with pytest.raises(ValueError, match="adds up to 5 layers, but the model has 6"):
        PipelinePlan(split=(2, 3)).layers(_config(6), 2)


@pytest.mark.parametrize("head", [0.0, 1.5, 40.0])
@pytest.mark.parametrize(("layers", "stages"), [(4, 2), (7, 3), (12, 4), (13, 5), (9, 9)])
def test_layers_that_are_alike_are_cut_as_any_others(layers: int, stages: int, head: float) -> None:
    """The short way gives what the search over all cuts gives; a layer that costs a trifle more takes the long way."""
    costs = [4.0] * layers
    cut = cut_by_cost(costs, stages, head)
    searched = min(
        (max(sums), sum(s * s for s in sums), sizes)
        for borders in itertools.combinations(range(1, layers), stages - 1)
        for sizes in [tuple(b - a for a, b in itertools.pairwise((0, *borders, layers)))]
        for sums in [[4.0 * n + head * (i == stages - 1) for i, n in enumerate(sizes)]]
    )
    assert cut == searched[2]

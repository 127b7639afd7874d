# SPDX-License-Identifier: Apache-2.0
"""Tokens in parts, and padded to a capacity: laws of what the planner says they cost."""

import json
from dataclasses import replace

import pytest

from lightning_moefold.cli.main import main
from lightning_moefold.dispatch import DispatchConfig
from lightning_moefold.fold import Fold
from lightning_moefold.planner import MODELS, PRESETS, CostModel, Job, Plan, PlanError
from lightning_moefold.planner.cost.layer import LayerCosts
from lightning_moefold.planner.cost.routing import PROFILES
from lightning_moefold.planner.search.search import Planner
from lightning_moefold.planner.search.space import Space

JOB = Job(MODELS["qwen2-57b-a14b"], 64, PRESETS["dgx-h100"], 256, 4096)


def costs(**changes):
    return LayerCosts(replace(JOB, **changes))


def test_parts_hide_behind_experts():
    """All but the first way there and the last way back, where the products last longer and overlap loses nothing."""
    perfect = replace(JOB.hardware, kernels=replace(JOB.hardware.kernels, overlap=1.0, collective=0.0))
    links = [replace(link, latency=0.0) for link in (perfect.intra, perfect.inter)]
    perfect = replace(perfect, intra=links[0], inter=links[1])
    whole = costs(hardware=perfect).experts(4, 1, 2048, "alltoall")
    for parts in (2, 4, 8):
        block = costs(hardware=perfect, dispatch_chunks=parts).experts(4, 1, 2048, "alltoall")
        for there, before in ((block.forward, whole.forward), (block.backward, whole.backward)):
            assert there["a2a"] == pytest.approx(before["a2a"] / parts)
            # Parts are cut between experts: the products are the same.
            assert there["experts"] == before["experts"]


def test_parts_pay_for_latency():
    """So that few tokens travel best in one part, more in a few, and very many in many."""
    best = []
    for tokens in (16, 1024, 16384):
        seconds = {
            n: costs(dispatch_chunks=n).experts(4, 1, tokens, "alltoall").forward_total for n in (1, 2, 4, 8, 16)
        }
        best.append(min(seconds, key=seconds.__getitem__))
    assert best[0] == 1
    assert 1 < best[1] < best[2]


def test_what_does_not_fit_behind_the_products_is_seen():
    """Without overlap nothing is gained, and every part costs a message's latency."""
    hardware = replace(JOB.hardware, kernels=replace(JOB.hardware.kernels, overlap=0.0))
    one, four = (costs(hardware=hardware, dispatch_chunks=n).experts(4, 1, 2048, "alltoall").forward for n in (1, 4))
    kernels, near = hardware.kernels, hardware.intra.latency * 3
    assert four["a2a"] - one["a2a"] == pytest.approx(2 * 3 * (kernels.collective + near))


def test_no_more_parts_than_experts():
    assert costs(dispatch_chunks=16).chunks(8) == 8
    assert costs(dispatch_chunks=16).chunks(1) == 1
    assert costs(dispatch_chunks=16).experts(8, 1, 512, "alltoall") == costs(dispatch_chunks=8).experts(
        8, 1, 512, "alltoall"
    )


@pytest.mark.parametrize("scope", ["full_sequence", "sub_sequence"])
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25, 100.0])
@pytest.mark.parametrize(("tp", "cp"), [(1, 1), (2, 1), (2, 4)])
def test_padded_rows_are_those_of_the_dispatcher(scope, factor, tp, cp):
    """Rows of all experts from one rank, as `MoELayer` asks for them of two rows of 4,096 tokens."""
    model, config = JOB.model, DispatchConfig(capacity_factor=factor, drop_scope=scope, pad_to_capacity=True)
    experts, k = model.num_experts, model.num_experts_per_tok
    tokens = 2 * 4096 // (tp * cp)
    if scope == "full_sequence":
        each = min(tokens, 2 * config.capacity(4096, k, experts))
    else:
        each = config.capacity(tokens, k, experts)
    load = costs(capacity_factor=factor, drop_scope=scope, pad_to_capacity=True).load(4, tp * cp)
    assert tokens * k * load == pytest.approx(experts * each)


def test_padding_is_the_same_under_every_routing_and_costs_what_is_empty():
    padded = replace(JOB, capacity_factor=1.25, pad_to_capacity=True)
    plan = Plan(Fold.parse("tp2 pp4 | ep4", 64))
    by = [CostModel(padded.with_routing(profile)).estimate(plan) for profile in PROFILES.values()]
    assert len({estimate.step_time for estimate in by}) == 1
    assert len({estimate.memory.total for estimate in by}) == 1
    dropped = CostModel(replace(JOB, capacity_factor=1.25)).estimate(plan)
    # Rows are cut over tp: each rank may hold all that an expert serves.
    assert (by[0].load, dropped.load) == (2.5, 1.0)
    assert by[0].times["experts"] > 1.9 * dropped.times["experts"]
    assert by[0].memory.activations > dropped.memory.activations
    alone = CostModel(replace(padded, drop_scope="sub_sequence")).estimate(plan)
    assert alone.load == 1.25


def test_contradictions():
    with pytest.raises(PlanError, match="needs a capacity_factor"):
        replace(JOB, pad_to_capacity=True)
    with pytest.raises(PlanError, match="dispatch_chunks=0 must be at least 1"):
        replace(JOB, dispatch_chunks=0)
    with pytest.raises(PlanError, match="drop_scope='row' is not known"):
        replace(JOB, drop_scope="row")
    with pytest.raises(PlanError, match="neither pads"):
        Planner(replace(JOB, dispatch_chunks=2), Space(dispatchers=("alltoall", "allgather")))


def test_explained_and_handed_on(capsys):
    base = ["plan", "--model", "qwen2-57b-a14b", "--gpus", "64", "--global-batch-size", "256", "--capacity-factor", "1"]
    base += ["--pad-to-capacity", "--dispatch-chunks", "4", "--drop-scope", "sub_sequence", "--dispatcher", "any"]
    assert main([*base, "--explain", "tp2 pp4 | ep4"]) == 0
    text = capsys.readouterr().out
    for words in ("padded, tokens in 4 parts", "empty ones among them", "in 4 parts of 4 experts", "dispatch_chunks=4",
                  "pad_to_capacity=True", "drop_scope='sub_sequence'"):  # fmt: skip
        assert words in text
    assert main([*base, "--fold", "tp2 pp4 | ep4", "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert (out["job"]["pad_to_capacity"], out["job"]["dispatch_chunks"]) == (True, 4)

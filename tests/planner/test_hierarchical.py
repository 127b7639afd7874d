# SPDX-License-Identifier: Apache-2.0
"""Tokens that travel by node: what the planner says they cost, when it takes that way, and what it says about it."""

import json
from dataclasses import replace
from itertools import product

import pytest

from lightning_moefold.cli.main import main
from lightning_moefold.fold import Fold
from lightning_moefold.planner import MODELS, PRESETS, PROFILES, CostModel, Job, Plan, Planner, Space
from lightning_moefold.planner.cost.layer import LayerCosts
from lightning_moefold.planner.cost.pairs import pairs_of
from lightning_moefold.planner.search.space import legal_folds

JOB = Job(MODELS["qwen2-57b-a14b"], 64, PRESETS["dgx-h100"], 256, 4096)
ALL = Space(dispatchers=JOB.dispatchers)


def machine(intra=None, inter=None, collective=0.0, host_sync=0.0, latency=0.0):
    """A DGX H100 whose collectives cost what is said, and nothing beside bytes otherwise."""
    base = JOB.hardware
    kernels = replace(base.kernels, collective=collective, host_sync=host_sync, alltoall_efficiency=1.0, launch=0.0)
    links = [
        replace(link, bandwidth=rate or float("inf"), efficiency=1.0, latency=latency)
        for link, rate in ((base.intra, intra), (base.inter, inter))
    ]
    return replace(base, intra=links[0], inter=links[1], kernels=kernels)


@pytest.mark.parametrize("routing", PROFILES.values(), ids=PROFILES)
@pytest.mark.parametrize(("ep", "etp", "nodes"), [(16, 1, 2), (64, 1, 8), (16, 2, 4), (8, 4, 4)])
def test_bytes_of_each_step(routing, ep, etp, nodes):
    """Of the busiest rank: pairs of token and node between nodes, pairs of token and rank within, each there and back."""
    model, tokens, rate = JOB.model, 2048, 1e9
    row = model.hidden_size * JOB.activation_bytes
    for slow in ("intra", "inter"):
        costs = LayerCosts(replace(JOB, hardware=machine(**{slow: rate}), routing=routing))
        forward = costs.experts(ep, etp, tokens, "hierarchical").forward
        places = nodes if slow == "inter" else ep
        others = (nodes - 1) / nodes if slow == "inter" else (ep / nodes - 1) / (ep / nodes)
        pairs = pairs_of(routing, model.num_experts, model.num_experts_per_tok, places)
        assert forward["a2a"] == pytest.approx(2 * others * tokens * pairs.busiest * row / rate)


def test_bytes_by_hand():
    """64 experts over two nodes of eight, eight choices: a token misses a node with the probability of eight of its 32."""
    missed = 1.0
    for i in range(8):
        missed *= (32 - i) / (64 - i)
    costs = LayerCosts(replace(JOB, hardware=machine(inter=50e9)))
    seconds = costs.experts(16, 1, 1000, "hierarchical").forward["a2a"]
    assert seconds == pytest.approx(2 * 1000 * (1 - missed) * 3584 * 2 / 50e9)
    once = costs.experts(16, 1, 1000, "deduplicated").forward["a2a"]
    missed = 1.0
    for i in range(8):
        missed *= (60 - i) / (64 - i)
    assert once == pytest.approx(2 * 1000 * 8 * (1 - missed) * 3584 * 2 / 50e9)


def test_collectives_and_waits():
    """The second step has four collectives forward and three backward, one host wait, and the latency of its own links."""
    costs = LayerCosts(replace(JOB, hardware=machine(collective=1.0, host_sync=10.0)))
    one, two = (costs.experts(16, 1, 2048, name) for name in ("deduplicated", "hierarchical"))
    assert two.forward["a2a"] - one.forward["a2a"] == pytest.approx(4)
    assert two.backward["a2a"] - one.backward["a2a"] == pytest.approx(3)
    assert (one.forward["launch"], two.forward["launch"]) == pytest.approx((10, 20))
    costs = LayerCosts(replace(JOB, hardware=machine(latency=1.0)))
    # One hop between two nodes, there and back; seven hops between the ranks of a node, four times.
    assert costs.experts(16, 1, 2048, "hierarchical").forward["a2a"] == pytest.approx(2 * 1 + 4 * 7)


@pytest.mark.parametrize("text", ["tp2 pp2 | ep8", "tp4 | ep4 etp2", "| ep8 etp8", "pp8 | ep4", "| ep1 etp4"])
def test_one_level_is_deduplicated(text):
    """Within a node, and where each node has one rank of ep."""
    model, fold = CostModel(JOB), Fold.parse(text, 64)
    once, by_node = (model.estimate(Plan(fold, 1, dispatcher=name)) for name in ("deduplicated", "hierarchical"))
    assert by_node.times == once.times
    assert by_node.memory == once.memory
    assert [e.plan.dispatcher for e in Planner(JOB, Space(dispatchers=("hierarchical",))).evaluate(fold)][
        0
    ] == "hierarchical"


def test_it_is_chosen_where_the_network_is_slow():
    """Across nodes and with many choices; not where links are alike, and the second step is only more work."""
    fold = Fold.parse("tp2 | ep64", 64)

    def chosen(hardware):
        return Planner(replace(JOB, hardware=hardware), ALL).evaluate(fold)[0].plan.dispatcher

    assert chosen(JOB.hardware) == "hierarchical"
    assert chosen(replace(JOB.hardware, inter=JOB.hardware.intra)) != "hierarchical"
    assert chosen(replace(JOB.hardware, gpus_per_node=64)) != "hierarchical"


def test_bounds_lose_nothing():
    """As without it, with all dispatchers; folds in one node are not looked at twice."""
    job = replace(JOB, world_size=16, global_batch_size=32, hardware=replace(JOB.hardware, gpus_per_node=2))
    space = replace(ALL, schedules=("1f1b",), micro_batch_sizes=(1, 2))
    best, ways = {}, {}
    for name in space.dispatchers:
        alone = Planner(job, replace(space, dispatchers=(name,)))
        for fold in legal_folds(job):
            found = alone.evaluate(fold)[0]
            if found.fits and found.step_time < best.get(fold, float("inf")):
                best[fold], ways[fold] = found.step_time, name
    plans = Planner(job, space).search(keep=5).plans
    assert [e.step_time for e in plans[:5]] == sorted(best.values())[:5]
    assert [e.plan.dispatcher for e in plans[:5]] == [ways[e.plan.fold] for e in plans[:5]]
    assert "hierarchical" in ways.values()
    assert "hierarchical" not in Planner(job, space)._dispatchers(Fold.parse("ep2", 16))


def test_memory_of_what_is_under_way():
    """In two steps what has reached the node is there, too; what does not travel is the same."""
    fold = Fold.parse("tp2 | ep16", 64)
    small = replace(JOB.model, moe_intermediate_size=64, num_experts_per_tok=2)  # the exchange is what is fullest
    memory = CostModel(replace(JOB, model=small)).memory
    once, by_node = (memory.estimate(Plan(fold, 1, dispatcher=name)) for name in ("deduplicated", "hierarchical"))
    row, tokens = small.hidden_size * 2, 2048
    ranks, nodes = (pairs_of(JOB.routing, 64, 2, places).mean for places in (16, 2))
    assert by_node.buffers == pytest.approx(tokens * row * (nodes + 2 * ranks + 2))
    assert once.buffers < by_node.buffers
    for part in ("weights", "gradients", "optimizer", "activations"):
        assert getattr(by_node, part) == getattr(once, part)


def test_explained_and_handed_on(capsys):
    base = ["plan", "--model", "qwen2-57b-a14b", "--gpus", "64", "--global-batch-size", "256", "--dispatcher"]
    assert main([*base, "hierarchical", "--explain", "tp2 | ep16"]) == 0
    text = capsys.readouterr().out
    for words in ("2.00 of 2 nodes", "of 16 ranks, among the 8 of each node", "dispatcher='hierarchical', node_size=8"):
        assert words in text
    assert main([*base, "any", "--fold", "tp2 | ep64", "--routing", "balanced", "--json"]) == 0
    [plan, *_] = json.loads(capsys.readouterr().out)["plans"]
    assert (plan["dispatcher"], plan["strategy"]["node_size"]) == ("hierarchical", 8)
    for name, words in (("deduplicated", "once to each of 6"), ("allgather", "each gather moves")):
        assert main([*base, name, "--explain", "tp2 | ep16"]) == 0
        assert words in capsys.readouterr().out
    assert main([*base, "hierarchical", "--explain", "tp2 pp2 | ep8"]) == 0
    text = capsys.readouterr().out
    assert "of 8 ranks on average" in text
    assert "node_size" not in text


def test_every_way_costs_something_under_every_fold():
    """Nothing free: bytes of each way are those of its pairs, never fewer than the pairs that must reach other nodes."""
    costs = LayerCosts(JOB)
    for (ep, etp), tokens in product([(16, 1), (32, 1), (64, 1), (8, 2)], [256, 4096]):
        by_node = costs.experts(ep, etp, tokens, "hierarchical").forward["a2a"]
        nodes = ep * etp // 8
        least = tokens * costs.pairs(nodes).mean * (1 - 1 / nodes) * 3584 * 2 / JOB.hardware.inter.rate
        assert by_node > 2 * least

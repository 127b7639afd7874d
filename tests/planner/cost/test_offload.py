# SPDX-License-Identifier: Apache-2.0
"""What offloading costs and saves in a plan, and when the planner proposes it."""

from dataclasses import replace

import pytest
import yaml

from lightning_moefold.fold import Fold
from lightning_moefold.planner import MODELS, PRESETS, CostModel, Job, Plan, PlanError, Planner, Space, search
from lightning_moefold.planner.cost.schedules import pipeline_layout
from lightning_moefold.planner.machine.hardware import GIB, Hardware, Link
from lightning_moefold.planner.report.advice import hints
from lightning_moefold.planner.report.recipe import python_recipe, yaml_recipe
from lightning_moefold.planner.report.walk import walk

H100 = PRESETS["dgx-h100"]


def job_on(hardware=H100, **changes):
    values = {"precision": "bf16-true", "master_weights": True, **changes}
    return Job(MODELS["qwen1.5-moe-a2.7b"], 8, hardware, 64, 4096, **values)


def seconds(bandwidth, offload, fold="ep4", **changes):
    costs = CostModel(job_on(replace(H100, host=Link(bandwidth, 0.0, 1.0))))
    return costs.estimate(Plan(Fold.parse(fold, 8), 1, offload=offload, **changes))


@pytest.mark.parametrize("fold", ["ep4", "tp2 pp2 | ep4"])
def test_the_time_that_computation_does_not_hide(fold):
    """A link without limits costs nothing; on a very slow one, all bytes are seen, both ways in each micro-batch."""
    plain = seconds(1e9, "none", fold)
    assert "offload" not in plain.times
    assert seconds(1e30, "activations,state", fold).times["offload"] == pytest.approx(0.0, abs=1e-9)
    slow = seconds(1e3, "activations", fold)
    costs = CostModel(job_on())
    layers = max(held.layers for held in pipeline_layout(costs.job.model, slow.plan.fold.pp, 1, "1f1b"))
    one = costs.memory.saved(slow.plan)[0]
    both = (2 * layers + 1) * one * slow.microbatches / 1e3  # nothing hides the way back of the last layer
    assert slow.times["offload"] == pytest.approx(both, rel=1e-3)
    state = seconds(1e3, "state", fold)
    assert state.times["offload"] == pytest.approx(2 * state.memory.host_state / 1e3, rel=1e-3)
    assert sum(slow.bounds.values()) == pytest.approx(slow.step_time)
    assert slow.bound_by == "host link"


def test_copies_hide_behind_computation():
    """At the link's real speed, most of the time is hidden; more bandwidth never costs more."""
    times = [seconds(rate * 1e9, "activations").times["offload"] for rate in (16, 32, 64)]
    assert times == sorted(times, reverse=True)
    e = seconds(64e9, "activations")
    way = e.memory.host_activations * e.microbatches / 64e9
    assert e.times["offload"] < 2 * way


def test_a_plan_that_fits_only_with_offloading():
    small = job_on(replace(H100, memory_bytes=40 * GIB), name="qwen1.5-moe-a2.7b")
    space = Space(recomputes=("none",), micro_batch_sizes=(4,), dispatchers=("alltoall",))
    assert not search(small, replace(space, offloads=("none",)), 1).best.fits
    best = search(small, space, 1).best
    assert best.fits
    assert best.plan.offload != "none"
    assert best.times["offload"] > 0
    notes = hints(search(small, space, 1), space)
    assert any(note.startswith("Without offloading no plan fits.") for note in notes)
    config = yaml.safe_load(yaml_recipe(best))
    arguments, module = config["trainer"]["strategy"]["init_args"], config["model"]["init_args"]
    assert arguments.get("offload_activations", False) == best.plan.offloads("activations")
    assert module.get("offload_state", False) == best.plan.offloads("state")
    both = CostModel(best.job).estimate(replace(best.plan, offload="activations,state"))
    assert "offload_activations=True" in python_recipe(both)
    assert "offload_state(MasterWeights(torch.optim.AdamW" in python_recipe(both)
    text = "\n".join(walk(best.job, both))
    assert "offloaded over the host link (57 GB/s each way)" in text
    assert "activations of a MoE layer" in text
    assert "optimizer state: " in text


def test_offloading_is_not_proposed_needlessly():
    """A plan that fits without stays as it is; on CPU ranks nothing moves."""
    job = job_on()
    assert search(job, Space(), 1).best.plan.offload == "none"
    with pytest.raises(PlanError, match="moves nothing on CPU"):
        Planner(job_on(PRESETS["cpu"]), Space(offloads=("state",)))
    with pytest.raises(PlanError, match="offload='weights' is not known"):
        Space(offloads=("weights",))


def test_the_link_is_read_from_a_file(tmp_path):
    file = tmp_path / "box.toml"
    file.write_text('base = "a100"\n[host]\nbandwidth_gb_s = 20\n')
    found = Hardware.from_toml(file)
    assert found.host.rate == pytest.approx(20e9 * PRESETS["a100"].host.efficiency)
    file.write_text(found.to_toml())
    assert Hardware.from_toml(file).host == found.host

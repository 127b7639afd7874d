# SPDX-License-Identifier: Apache-2.0
"""``choose`` and the machine at hand."""

import json

import pytest

from lightning_moefold.planner import MODELS, PRESETS, Job, PlanError, Space, choose, machine_for


def test_the_choice_says_why_and_can_be_stored():
    choice = choose(Job(MODELS["mixtral-8x7b"], 16, PRESETS["dgx-h100"], 64, 4096))
    assert str(choice.estimate.plan.fold) in choice.reason
    assert "next is" in choice.reason
    assert json.loads(json.dumps(choice.record))["fold"] == str(choice.estimate.plan.fold)


def test_a_strategy_can_narrow_the_choice():
    job = Job(MODELS["mixtral-8x7b"], 16, PRESETS["dgx-h100"], 64, 4096)
    choice = choose(job, Space(schedules=("1f1b",), recomputes=("none", "full"), micro_batch_sizes=(1,)))
    assert choice.estimate.plan.recompute in ("none", "full")
    assert choice.estimate.plan.schedule == "1f1b"


def test_nothing_fits():
    with pytest.raises(PlanError, match="No plan fits"):
        choose(Job(MODELS["qwen3-235b-a22b"], 8, PRESETS["dgx-h100"], 64, 4096))


def test_machines():
    assert machine_for("NVIDIA H100 80GB HBM3", 8) == PRESETS["dgx-h100"]
    assert machine_for("NVIDIA H200", 4).gpus_per_node == 4
    assert machine_for(None, 2).name == "cpu"
    assert machine_for("NVIDIA A100-SXM4-40GB", 8, 40e9).memory_bytes == 40e9

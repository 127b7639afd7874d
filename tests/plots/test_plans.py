# SPDX-License-Identifier: Apache-2.0
"""Pictures of a search, and the roofline in them."""

import json

import pytest

from lightning_moefold.cli.main import main
from lightning_moefold.planner import MODELS, PRESETS, Job, Planner, RoutingProfile
from lightning_moefold.planner.cost.roofline import roofline
from lightning_moefold.planner.report.explain import result_json
from lightning_moefold.plots.plans import read_plans, write_plots


def search(**changes):
    job = Job(MODELS["mixtral-8x7b"], 16, PRESETS["dgx-h100"], 64, 4096, **changes)
    return job, Planner(job).search(keep=2)


def test_pictures_from_a_file(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    found = result_json(search()[1], [], 0.0)
    (tmp_path / "plans.json").write_text(json.dumps(found))
    assert read_plans(tmp_path / "plans.json")["plans"] == found["plans"]
    assert main(["plot", str(tmp_path / "plans.json")]) == 0
    written = capsys.readouterr().out.split()
    assert [path.rpartition("/")[2] for path in written] == ["mfu.png", "memory.png", "roofline.png"]
    for path in write_plots(found, tmp_path / "new"):
        assert path.stat().st_size > 1000
    (tmp_path / "other.json").write_text("{}")
    assert main(["plot", str(tmp_path / "other.json")]) == 2
    assert "moefold plan --json" in capsys.readouterr().err


def test_a_layer_below_the_roof():
    job, result = search()
    assert result.plans
    for estimate in result.plans:
        [point] = roofline(job, estimate)  # balanced: all layers are alike
        assert point.load == 1
        ratio = point.ratio or float("inf")
        roof = job.hardware.kernels.gemm_efficiency * (ratio / (1 + ratio) if point.ratio else 1)
        assert 0 < point.achieved <= roof * (1 + 1e-9)


def test_each_layer_of_a_trace_has_its_point():
    shares = ((1 / 8,) * 8, (0.3, *(0.1,) * 7))
    job, result = search(routing=RoutingProfile("trace", shares=shares))
    plan = next(e for e in result.plans if e.plan.fold.ep > 1)
    even, uneven = roofline(job, plan)
    assert (even.layer, uneven.layer) == (0, 1)
    assert even.load == pytest.approx(1)
    assert uneven.load > 1.1
    assert uneven.achieved < even.achieved / 1.1

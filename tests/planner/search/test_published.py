# SPDX-License-Identifier: Apache-2.0
"""The planner against the ten published runs."""

from dataclasses import replace

import pytest

from lightning_moefold.fold import Fold
from lightning_moefold.planner import PRESETS, Planner
from lightning_moefold.planner.search.published import RUNS, compare, same_order


@pytest.fixture(scope="module")
def pairs():
    return compare()


def test_error(pairs):
    relative = [abs(estimate.mfu / run.mfu - 1) for run, estimate in pairs]
    points = [abs(estimate.mfu - run.mfu) for run, estimate in pairs]
    assert sum(relative) / len(pairs) < 0.07
    assert sum(points) / len(pairs) < 0.012


def test_methods_come_in_the_published_order(pairs):
    assert same_order(pairs)


def test_every_published_run_fits_its_memory(pairs):
    assert all(estimate.fits for _, estimate in pairs)


@pytest.mark.parametrize("run", [RUNS[4], RUNS[9]], ids=lambda run: run.model)
def test_own_best_plan_is_at_least_as_good(run):
    planner = Planner(run.job())
    best = planner.search(keep=1).best
    published = planner.evaluate(Fold.parse(run.fold, run.gpus))[0]
    assert best.mfu >= published.mfu
    assert best.mfu >= run.mfu * 0.98


def test_it_is_physics_not_a_fit():
    """No constant carries the result alone: 10% on any calibrated one leaves the folding gain and its size in place."""
    machine = PRESETS["dgx-h100"]
    for name in ("gemm_efficiency", "overlap", "alltoall_efficiency"):
        for factor in (0.9, 1.1):
            kernels = replace(machine.kernels, **{name: getattr(machine.kernels, name) * factor})
            hardware = replace(machine, kernels=kernels)
            for coupled, folded in ((RUNS[3], RUNS[4]), (RUNS[8], RUNS[9])):
                gain = folded.predict(hardware).mfu / coupled.predict(hardware).mfu
                assert 1.02 < gain < 1.15, (name, factor, gain)

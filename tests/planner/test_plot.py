# SPDX-License-Identifier: Apache-2.0
"""Pictures of a search."""

import pytest

from lightning_moefold.planner import MODELS, PRESETS, Job, Planner
from lightning_moefold.planner.plot import roofline_point, write_plots


def test_pictures_and_roofline(tmp_path):
    pytest.importorskip("matplotlib")
    job = Job(MODELS["mixtral-8x7b"], 16, PRESETS["dgx-h100"], 64, 4096)
    result = Planner(job).search(keep=2)
    for path in write_plots(result, tmp_path / "new"):
        assert path.stat().st_size > 1000
    for estimate in result.plans:
        ratio, achieved = roofline_point(job, estimate)
        assert 0 < achieved <= job.hardware.kernels.gemm_efficiency * ratio / (1 + ratio) * (1 + 1e-9)

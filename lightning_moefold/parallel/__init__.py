# SPDX-License-Identifier: Apache-2.0
"""How the dimensions of a fold are applied to a model, and what gradients need afterwards."""

from typing import TYPE_CHECKING

from lightning_moefold.lazy import lazy_names

if TYPE_CHECKING:
    from lightning_moefold.parallel.apply import parallelize
    from lightning_moefold.parallel.gradients import GradientSum, local_part
    from lightning_moefold.parallel.norms import GradientNorm
    from lightning_moefold.parallel.pipeline.plan import PipelinePlan
    from lightning_moefold.parallel.settings import Settings, Sharding

__all__ = ["GradientNorm", "GradientSum", "PipelinePlan", "Settings", "Sharding", "local_part", "parallelize"]
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "GradientNorm": "norms",
        "GradientSum": "gradients",
        "PipelinePlan": "pipeline.plan",
        "Settings": "settings",
        "Sharding": "settings",
        "local_part": "gradients",
        "parallelize": "apply",
    },
)

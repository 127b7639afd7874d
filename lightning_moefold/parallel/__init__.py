# SPDX-License-Identifier: Apache-2.0
"""How the dimensions of a fold are applied to a model, and what gradients need afterwards."""

from lightning_moefold.parallel.apply import Sharding, parallelize
from lightning_moefold.parallel.gradients import GradientSum, local_part
from lightning_moefold.parallel.norms import GradientNorm

__all__ = ["GradientNorm", "GradientSum", "Sharding", "local_part", "parallelize"]

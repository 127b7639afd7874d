# SPDX-License-Identifier: Apache-2.0
"""Memory-bound steps of a layer: one Triton kernel each where Triton can run, PyTorch's operations otherwise."""

from lightning_moefold.kernels.gated import gated
from lightning_moefold.kernels.rotary import rotate
from lightning_moefold.kernels.softmax import row_statistics, softmax_slope

__all__ = ["gated", "rotate", "row_statistics", "softmax_slope"]

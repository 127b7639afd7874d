# SPDX-License-Identifier: Apache-2.0
"""Memory-bound steps of a layer: one Triton kernel each where Triton can run, PyTorch's operations otherwise."""

from lightning_moefold.kernels.availability import runs_triton
from lightning_moefold.kernels.gated import gated, gated_backward, gated_forward
from lightning_moefold.kernels.rotary import rotate
from lightning_moefold.kernels.row_sums import sum_of_copies, sum_of_tokens
from lightning_moefold.kernels.softmax import row_statistics, softmax_slope

__all__ = [
    "gated",
    "gated_backward",
    "gated_forward",
    "rotate",
    "row_statistics",
    "runs_triton",
    "softmax_slope",
    "sum_of_copies",
    "sum_of_tokens",
]

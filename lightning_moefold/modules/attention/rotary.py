# SPDX-License-Identifier: Apache-2.0
"""Tables of rotary position embedding (RoFormer, arXiv 2104.09864), in the half-split form of Llama.

Legend: B rows, S positions, d head size, h = d / 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_moefold.modules.base import wide


def rotary_tables(
    position_BS: Tensor, head_dim: int, theta: float, dtype: torch.dtype, scaling_factor: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Computes cosine and sine of every position's angles, each ``[B, S, h]``, in at least float32.

    Args:
        position_BS: Positions, int64.
        head_dim: Head size d, an even number.
        theta: Base of the geometric series of frequencies.
        dtype: Data type of the returned tables.
        scaling_factor: Divisor of the frequencies (linear position interpolation).
    """
    exact = wide(dtype)
    exponent_h = torch.arange(0, head_dim, 2, device=position_BS.device, dtype=exact) / head_dim
    frequency_h = 1.0 / (theta**exponent_h) / scaling_factor
    angle_BSh = position_BS.unsqueeze(-1).to(exact) * frequency_h
    return angle_BSh.cos().to(dtype), angle_BSh.sin().to(dtype)

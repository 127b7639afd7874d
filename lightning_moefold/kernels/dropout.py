# SPDX-License-Identifier: Apache-2.0
"""Dropout by a hash of each token and input: the same under every fold, and when it is computed again.

Legend: N tokens, I inputs.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lightning_moefold.comm import linear
from lightning_moefold.kernels.availability import runs_triton
from lightning_moefold.kernels.noise import uniform


def drop_by(x_NI: Tensor, key_N: Tensor, probability: float, first: int) -> Tensor:
    """Sets numbers to zero with a probability, and scales the others so that the mean stays.

    The Triton kernel hashes again in backward, and keeps no mask.

    Args:
        x_NI: Inputs.
        key_N: A hash for each token, int64.
        probability: Probability of being set to zero, in [0, 1).
        first: Number of the first of these inputs among all that the hash tells apart.
    """
    scale = 1 / (1 - probability)
    if runs_triton(x_NI, key_N):
        from lightning_moefold.kernels.dropout_triton import dropped

        # The probability as float32, in which the numbers below are compared with it.
        least = math.ceil(float(np.float32(probability)) * (1 << 24))

        def masked(x: Tensor) -> Tensor:
            return dropped(x, key_N, least, scale, first)

        return linear(x_NI, masked, masked)
    kept_NI = uniform(key_N, x_NI.shape[-1], torch.float32, first) >= probability
    return x_NI * kept_NI * scale

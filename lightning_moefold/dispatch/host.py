# SPDX-License-Identifier: Apache-2.0
"""From the host, which has planned a pass, to the device that runs it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_moefold.balance.copies import Counts


def to_device(arrays: Sequence[Counts], device: torch.device) -> list[Tensor]:
    """Brings int64 arrays to the device, all in one copy; on CUDA the host does not wait for it."""
    flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
    if device.type == "cuda":
        flat = flat.pin_memory()
    parts = flat.to(device, non_blocking=True).split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]

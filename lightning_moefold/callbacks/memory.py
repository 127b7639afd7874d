# SPDX-License-Identifier: Apache-2.0
"""Memory of this rank: of its GPU, or of its process."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

UNKNOWN = float("nan")
_STATM = Path("/proc/self/statm")


@dataclass(frozen=True)
class Memory:
    """Bytes; NaN where there is no such figure.

    Args:
        allocated: Held by tensors now; on CPU the resident size of the process.
        reserved: Taken from the GPU by torch's allocator, tensors included.
        peak: The most ever allocated.
    """

    allocated: float
    reserved: float
    peak: float


def read_memory(device: torch.device) -> Memory:
    """Memory of ``device``, or of this process if it is the CPU. Does not wait for the device."""
    if device.type == "cuda":
        return Memory(
            float(torch.cuda.memory_allocated(device)),
            float(torch.cuda.memory_reserved(device)),
            float(torch.cuda.max_memory_allocated(device)),
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    resident = UNKNOWN
    if _STATM.exists():  # Linux
        resident = float(_STATM.read_text().split()[1]) * resource.getpagesize()
        peak = max(peak, int(resident))
    return Memory(resident, UNKNOWN, float(peak))

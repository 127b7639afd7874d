# SPDX-License-Identifier: Apache-2.0
"""Memory use of this rank's GPU, or of its process on CPU."""

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
    """Memory use in bytes; NaN if a value is not available.

    Args:
        allocated: Bytes held by tensors now; on CPU the resident size of the process.
        reserved: Bytes that torch's allocator has taken from the GPU, tensors included.
        peak: Largest value of ``allocated`` so far.
    """

    allocated: float
    reserved: float
    peak: float


def read_memory(device: torch.device) -> Memory:
    """Reads the memory use of ``device``, or of this process if it is the CPU. Does not wait for the device."""
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

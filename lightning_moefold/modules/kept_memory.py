# SPDX-License-Identifier: Apache-2.0
"""Large blocks of CPU memory that are kept from one step to the next.

What a step frees goes back to the operating system, and the next step pays for each page again: for a layer of many small
experts that is a tenth of its forward and backward. CUDA has a caching allocator; PyTorch has none for CPU.
"""

from __future__ import annotations

import math
import weakref
from threading import Lock

import torch
from torch import Tensor

#: Smaller ones the allocator keeps by itself.
SMALLEST = 4 * 2**20


class KeptMemory:
    """Blocks that come back when the last tensor on them is dropped, and are lent again.

    Sizes are rounded up by at most a sixteenth, so that a count of rows that changes from step to step finds its block. New
    memory takes the place of blocks that nobody uses: in all there is never more than was once lent at the same time.
    """

    def __init__(self) -> None:
        self._free: list[Tensor] = []  # the longest unused first
        self._lock = Lock()

    def empty(self, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor; from the device's own allocator where it is small or not on CPU."""
        size = math.prod(shape) * dtype.itemsize
        if device.type != "cpu" or size < SMALLEST:
            return torch.empty(shape, dtype=dtype, device=device)
        block = self._block(size)
        lease = block.numpy()  # a new array on the block, which dies with the tensor's storage
        weakref.finalize(lease, self._free.append, block).atexit = False
        return torch.frombuffer(lease, dtype=dtype, count=math.prod(shape)).resize_(
            shape
        )  # a view would not be taken as gradient

    def _block(self, size: int) -> Tensor:
        step = 1 << (size.bit_length() - 5)
        size = -(-size // step) * step
        with self._lock:
            for number, block in enumerate(self._free):
                if block.numel() == size:
                    return self._free.pop(number)
            replaced = 0
            while self._free and replaced < size:
                replaced += self._free.pop(0).numel()
        return torch.empty(size, dtype=torch.uint8)

    def release(self) -> None:
        """Gives what nobody uses back to the operating system, and what is lent now when it is dropped."""
        self._free = []


#: Two, because each is bounded by what was lent at once, and gradients come when what was kept for them goes.
GRADIENTS, FOR_BACKWARD = KeptMemory(), KeptMemory()


def release() -> None:
    """Gives the memory back to the operating system, as ``torch.cuda.empty_cache`` does."""
    GRADIENTS.release()
    FOR_BACKWARD.release()

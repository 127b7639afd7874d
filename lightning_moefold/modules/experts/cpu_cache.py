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


class CpuCachingAllocator:
    """Blocks that come back when the last tensor on them is dropped, and are lent again.

    Sizes are rounded up by at most a sixteenth, so that a count of rows that changes from step to step finds its block. New
    memory takes the place of blocks that nobody uses: in all there is never more than was once lent at the same time.
    """

    def __init__(self) -> None:
        self._free: list[Tensor] = []  # the longest unused first
        self._lock = Lock()
        self._releases = 0

    def empty(self, like: Tensor, *shape: int) -> Tensor:
        """An uninitialised tensor, with PyTorch's own memory where it is small, not on CPU, or not real.

        Its storage cannot be resized.

        Args:
            like: Whose dtype and device it has.
            shape: Of the tensor.
        """
        count = math.prod(shape)
        size = count * like.element_size()
        real = type(like) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
        if size < SMALLEST or like.device.type != "cpu" or not real:
            return torch.empty(shape, dtype=like.dtype, device=like.device)
        block = self._block(size)
        lease = block.numpy()  # a new array on the block, which dies with the tensor's storage
        weakref.finalize(lease, self._take_back, block, self._releases).atexit = False
        # Resized and not viewed: autograd copies a view before it keeps it as a gradient.
        return torch.frombuffer(lease, dtype=like.dtype, count=count).resize_(shape)

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
        return torch.empty(size, dtype=torch.uint8, device="cpu")

    def _take_back(self, block: Tensor, releases: int) -> None:
        if releases == self._releases:
            self._free.append(block)

    def release(self) -> None:
        """Gives what nobody uses back to the operating system, and what is lent now when it is dropped."""
        self._releases += 1
        self._free.clear()


#: Two, because each is bounded by what was lent at once, and gradients come when what was kept for them goes.
GRADIENTS, FOR_BACKWARD = CpuCachingAllocator(), CpuCachingAllocator()


def release() -> None:
    """Gives the memory back to the operating system, as ``torch.cuda.empty_cache`` does."""
    GRADIENTS.release()
    FOR_BACKWARD.release()

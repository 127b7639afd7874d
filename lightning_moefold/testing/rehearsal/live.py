# SPDX-License-Identifier: Apache-2.0
"""Counts the bytes of fake tensors that exist at the same time: the memory that a step would need on a device."""

from __future__ import annotations

from typing import Any

from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from lightning_moefold.parallel import local_part


class LiveMemory:
    """Tracks storages from the operation that creates them until all references, also those of autograd, are gone.

    Attributes:
        peak: Largest number of bytes that existed at the same time.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._bound = 0  # upper bound of the live bytes, if nothing was freed since the last count
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def see(self, result: Any) -> None:
        """Registers the result of an operation; counts again if it could be a new peak, higher by a thousandth."""
        for leaf in tree_leaves(result):
            if isinstance(tensor := local_part(leaf) if isinstance(leaf, DTensor) else leaf, FakeTensor):
                storage = tensor.untyped_storage()
                # A weak reference prevents the address from being reused.
                if storage._cdata not in self._storages:
                    self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                    self._bound += storage.nbytes()
        if self._bound > 1.001 * self.peak:
            self.peak = max(self.peak, self.count())

    def count(self) -> int:
        """Counts the bytes that exist now."""
        self._storages = {key: entry for key, entry in self._storages.items() if not entry[0].expired()}
        self._bound = sum(size for _, size in self._storages.values())
        return self._bound

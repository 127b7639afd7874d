# SPDX-License-Identifier: Apache-2.0
"""Bytes of fake tensors that live at once: what a step would need on a device."""

from __future__ import annotations

from typing import Any

from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from lightning_moefold.parallel import local_part


class LiveMemory:
    """Follows storages from the operation that makes them until nobody holds them, the autograd graph included.

    Attributes:
        peak: Most bytes that lived at once.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._bound = 0  # of what lives, were nothing freed since it was last counted
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def see(self, result: Any) -> None:
        """Takes note of what an operation returns; counts anew where that could be a peak, higher by a thousandth."""
        for leaf in tree_leaves(result):
            if isinstance(tensor := local_part(leaf) if isinstance(leaf, DTensor) else leaf, FakeTensor):
                storage = tensor.untyped_storage()
                # A weak reference keeps the address from being used again.
                if storage._cdata not in self._storages:
                    self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                    self._bound += storage.nbytes()
        if self._bound > 1.001 * self.peak:
            self.peak = max(self.peak, self.count())

    def count(self) -> int:
        """Bytes that live now."""
        self._storages = {key: entry for key, entry in self._storages.items() if not entry[0].expired()}
        self._bound = sum(size for _, size in self._storages.values())
        return self._bound

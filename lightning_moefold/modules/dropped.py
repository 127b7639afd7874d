# SPDX-License-Identifier: Apache-2.0
"""Cheap tensors that backward makes again although the products that read them do not run again.

:func:`~.recompute.recomputed` drops what is inside a function. The output of a norm is the input of products, which keep it: here
it is what they keep that is replaced by the way to make it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lightning_moefold.modules.offload import OffloadedLayer, unpack


class _Dropped:
    """A tensor that backward makes when it is first read, and lets go of when it was read as often as it was kept."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self._make, self._reads = make, 0
        self._value: Tensor | None = None
        self.kept = 0

    def get(self) -> Tensor:
        """Returns its values."""
        with torch.no_grad():
            return self._make() if self._value is None else self._value

    def read(self) -> Tensor:
        """Returns its values, once for each time it was kept."""
        value, self._reads = self.get(), self._reads + 1
        self._value = value if self._reads % self.kept else None
        return value


class DroppedTensors(AbstractContextManager["DroppedTensors"]):
    """Within this context, what autograd would keep of registered tensors is dropped.

    All ranks read a gathered tensor at the same place of backward, because no other collective is between the products that do.

    Args:
        others: Where the other tensors go; by default they stay as they are.
    """

    def __init__(self, others: OffloadedLayer | None = None) -> None:
        self._others = others
        self._by_storage: dict[int, tuple[Tensor, _Dropped]] = {}

    def __enter__(self) -> DroppedTensors:
        self._stack = ExitStack()
        self._stack.enter_context(saved_tensors_hooks(self._pack, _unpack))
        self._stack.callback(_OPEN.reset, _OPEN.set(self))
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._stack.close()
        self._by_storage.clear()  # until now the tensors lived, so that no other one had their storage

    def drop(self, tensor: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """Registers a contiguous tensor; returns it.

        Args:
            tensor: In a storage of its own.
            make: Makes its values again. It must not hold the tensor.
        """
        device = tensor.device.type
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

        def as_before() -> Tensor:
            with torch.autocast(device, dtype, enabled):
                return make()

        self._by_storage[_storage(tensor)] = tensor, _Dropped(as_before)
        return tensor

    def find(self, tensor: Tensor) -> _Dropped | None:
        """Returns what was registered with the storage of a tensor."""
        found = self._by_storage.get(_storage(tensor))
        return None if found is None else found[1]

    def _pack(self, tensor: Tensor) -> Any:
        dropped = self.find(tensor)
        if dropped is None:
            return tensor if self._others is None else self._others.pack(tensor)
        dropped.kept += 1
        return dropped, tensor.size(), tensor.stride(), tensor.storage_offset()


def _storage(tensor: Tensor) -> int:
    """Returns a number of the storage, which tensors without elements have, too."""
    return tensor.untyped_storage()._cdata


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor) or not isinstance(packed[0], _Dropped):
        return unpack(packed)
    dropped, *view = packed
    return dropped.read().as_strided(*view)


_OPEN: ContextVar[DroppedTensors | None] = ContextVar("moefold_dropped", default=None)


def also_dropped(tensor: Tensor, source: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
    """Drops a tensor, too, that was made of a dropped one; returns it.

    Args:
        tensor: What ``make`` made of ``source``.
        source: May be dropped or not.
        make: Makes the tensor again.
    """
    found = None if torch.compiler.is_compiling() else _OPEN.get()
    if found is None or tensor is source or (dropped := found.find(source)) is None:
        return tensor
    return found.drop(tensor, partial(_made_of, dropped, make))


def _made_of(source: _Dropped, make: Callable[[Tensor], Tensor]) -> Tensor:
    return make(source.get())


def dropped(function: Callable[[Tensor], Tensor], source: Tensor) -> Tensor:
    """Calls ``function(source)``, and drops the result where a :class:`DroppedTensors` is open."""
    result = function(source)
    found = None if torch.compiler.is_compiling() else _OPEN.get()
    return result if found is None else found.drop(result, partial(function, source))

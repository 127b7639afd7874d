# SPDX-License-Identifier: Apache-2.0
"""Activations in host memory between forward and backward.

A layer's forward pass copies what autograd keeps to pinned memory, on a stream of its own, while the layer computes. When backward
enters a layer, all of it comes back on another stream, and so does what the layer before it kept. The host queues work faster than
it is done, so it waits for the device in each layer: otherwise memory would be taken for layers whose turn is far off. Two layers'
activations are on the device in forward, three in backward. On CPU, where tensors are in host memory already, they stay where they
are.
"""

from __future__ import annotations

import weakref
from collections import deque
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor

#: Bytes below which a copy costs more than it saves.
SMALLEST = 1 << 20
#: Devices whose tensors are copied. Tests add the CPU.
DEVICES = {"cuda"}

#: The last copy to the host of each of the two layers that ran last, and the moment when the device enters the layer that backward
#: entered last; of whatever micro-batch and pipeline stage, in the order in which the host queued them.
_COPIED: deque[torch.cuda.Event] = deque(maxlen=2)
_ENTERED: deque[torch.cuda.Event] = deque(maxlen=1)


class _Streams:
    """One stream each way."""

    def __init__(self, device: torch.device) -> None:
        self.there, self.back = torch.cuda.Stream(device), torch.cuda.Stream(device)


@cache
def _streams_of(device: torch.device) -> _Streams:
    """Returns the streams of a device, the same for all layers: what comes back is allocated in the pool of its stream."""
    return _Streams(device)


class _Kept:
    """A tensor on its way to host memory and back. Backward may read it several times. On CPU there are no streams."""

    def __init__(self, tensor: Tensor, streams: _Streams | None) -> None:
        self.streams, self.device = streams, tensor.device
        self.copied: torch.cuda.Event | None = None
        self._back: tuple[Tensor, torch.cuda.Event] | None = None
        self.times = self._reads = 0
        self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=streams is not None)
        if streams is None:
            self.host.copy_(tensor)
            return
        streams.there.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(streams.there):
            self.host.copy_(tensor, non_blocking=True)
            self.copied = streams.there.record_event()
        tensor.record_stream(streams.there)  # so that its memory is not given away before it has been read

    def fetch(self) -> None:
        """Starts the way back."""
        if self._back is not None or self.streams is None:
            return
        with torch.cuda.stream(self.streams.back):  # allocates there, too: memory of another stream may still be in use
            assert self.copied is not None
            self.streams.back.wait_event(self.copied)
            tensor = self.host.to(self.device, non_blocking=True)
            self._back = tensor, self.streams.back.record_event()

    def read(self) -> Tensor:
        """Returns the tensor; what has come back is let go of when it was read as often as it was kept."""
        self._reads += 1
        if self.streams is None:
            return self.host.clone()
        self.fetch()
        assert self._back is not None
        tensor, event = self._back
        if self._reads % self.times == 0:
            self._back = None
        current = torch.cuda.current_stream(self.device)
        current.wait_event(event)
        tensor.record_stream(current)
        return tensor


class OffloadedLayer(AbstractContextManager["OffloadedLayer"]):
    """Within this context, large tensors that autograd keeps go to host memory; weights of the layer stay.

    Args:
        layer: The layer.
        before: What the layer before it has kept, which comes back while backward is in this layer.

    Attributes:
        count: Number of tensors that went.
    """

    def __init__(self, layer: nn.Module, before: OffloadedLayer | None = None) -> None:
        self._parts = list(layer.modules())
        self._before = None if before is None else weakref.ref(before)
        self._copied: torch.cuda.Event | None = None  # the latest copy to the host
        self._device: torch.device | None = None
        self._in_backward = False
        self._members: list[weakref.ref[_Kept]] = []
        self.count = 0
        self._by_storage: dict[int, tuple[Tensor, _Kept]] = {}
        self._weights: set[int] = set()

    def __enter__(self) -> OffloadedLayer:
        if len(_COPIED) == 2:
            _COPIED[0].synchronize()
        self._hooks = saved_tensors_hooks(self.pack, unpack)
        self._hooks.__enter__()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._hooks.__exit__(*exc_info)
        if self._copied is not None:
            _COPIED.append(self._copied)
        self._by_storage.clear()
        self._weights.clear()

    def pack(self, tensor: Tensor) -> Any:
        """Returns what autograd keeps instead of a tensor."""
        if type(tensor) not in (
            Tensor,
            nn.Parameter,
        ):  # what a subclass holds (DTensor, tensors in FP8) is its own affair
            return tensor
        whole = tensor.untyped_storage()
        if tensor.device.type not in DEVICES or whole.nbytes() < SMALLEST:
            return tensor
        if tensor.numel() * tensor.element_size() != whole.nbytes():
            return tensor
        found = self._by_storage.get(whole._cdata)
        if found is None:  # several operations may keep the same tensor, which travels once
            if self._is_weight(whole._cdata):
                return tensor
            flat = tensor.detach().as_strided((tensor.numel(),), (1,), 0)
            kept = _Kept(flat, _streams_of(tensor.device) if tensor.is_cuda else None)
            self._members.append(weakref.ref(kept))
            self._copied, self._device = kept.copied, tensor.device
            self.count += 1
            found = self._by_storage[whole._cdata] = tensor, kept
        found[1].times += 1
        return self, found[1], tensor.size(), tensor.stride()

    def fetch(self) -> None:
        """Starts the way back of all that the layer has kept."""
        for reference in self._members:
            if (kept := reference()) is not None:
                kept.fetch()
        self._members = []

    def enter_backward(self) -> None:
        """Starts the way back of what this layer and the one before it have kept, when backward enters this one.

        The host waits until the device has entered the layer in which backward was before. In another backward of the same graph,
        and in the second part where a pipeline schedule splits backward, tensors come back one by one.
        """
        if self._in_backward:
            return
        self._in_backward = True
        if self._copied is not None:
            entered = torch.cuda.current_stream(self._device).record_event()
            if _ENTERED:
                _ENTERED[0].synchronize()
            _ENTERED.append(entered)
        self.fetch()
        before = None if self._before is None else self._before()
        if before is not None:
            before.fetch()

    def _is_weight(self, storage: int) -> bool:
        """Looks again for a storage that is not known, because FSDP2 gathers the experts' weights while the layer runs."""
        if storage not in self._weights:
            for part in self._parts:
                for parameter in part._parameters.values():
                    if parameter is not None:
                        local = parameter._local_tensor if isinstance(parameter, DTensor) else parameter
                        self._weights.add(local.untyped_storage()._cdata)
        return storage in self._weights


def unpack(packed: Any) -> Tensor:
    """Returns the tensor that was packed."""
    if isinstance(packed, Tensor):
        return packed
    layer, kept, size, stride = packed
    layer.enter_backward()
    tensor: Tensor = kept.read().as_strided(size, stride)
    return tensor

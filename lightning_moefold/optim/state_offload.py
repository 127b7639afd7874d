# SPDX-License-Identifier: Apache-2.0
"""Optimizer state in host memory between steps.

After a step the state is copied to pinned memory on a stream of its own, and its memory on the device is given back. It returns
when the gradients of the next step are there: after the closure, in which Lightning runs forward and backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_moefold.modules import offload
from lightning_moefold.parallel.gradients import local_part

O = TypeVar("O", bound=Optimizer)  # noqa: E741
_MARK = "_moefold_offloaded"


def offload_state(optimizer: O) -> O:
    """Keeps the state of an optimizer in host memory between its steps; for ``configure_optimizers``. Returns the optimizer.

    The step computes on the device as before, so the result is the same to the bit. On CPU nothing moves.

    Args:
        optimizer: Any optimizer; also :class:`~.master_weights.MasterWeights` and :class:`~.muon.Muon`.

    Example::

        def configure_optimizers(self):
            return offload_state(torch.optim.AdamW(self.parameters(), lr=1e-5))
    """
    if _MARK not in vars(optimizer):
        vars(optimizer)[_MARK] = offloaded = _Offloaded(optimizer)
        optimizer.register_step_pre_hook(offloaded.before_step)
        optimizer.register_step_post_hook(lambda *_: offloaded.send())
        optimizer.register_state_dict_pre_hook(lambda *_: offloaded.bring())
        optimizer.register_load_state_dict_pre_hook(lambda *_: offloaded.bring())
    return optimizer


def bring_state(optimizer: Optimizer) -> None:
    """Brings the state of an optimizer back until its next step, if it is in host memory: for whoever reads it."""
    offloaded = vars(optimizer).get(_MARK)
    if offloaded is not None:
        offloaded.bring()


class _Offloaded:
    """What an optimizer has in host memory."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._away: list[tuple[Tensor, int, Tensor]] = []
        self._hosts: dict[tuple[tuple[int, ...], torch.dtype], list[Tensor]] = {}  # free ones, pinned once
        self._stream: Any = None

    def before_step(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Brings the state when the closure is done, or at once if there is none."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # the first is the optimizer
        if closure is None:
            self.bring()
            return None

        def then_bring() -> Any:
            result = closure()
            self.bring()
            return result

        return args[:1], {**kwargs, "closure": then_bring}

    def send(self) -> None:
        """Copies the state to host memory and gives its own back."""
        for tensor in self._tensors():
            host = self._host_like(tensor)
            if tensor.is_cuda:
                self._stream = self._stream or torch.cuda.Stream()
                self._stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(self._stream):
                    host.copy_(tensor, non_blocking=True)
                tensor.record_stream(self._stream)  # so that what is freed now is given away only when it has been read
            else:
                host.copy_(tensor)
            storage = tensor.untyped_storage()
            self._away.append((tensor, storage.nbytes(), host))
            storage.resize_(0)

    def bring(self) -> None:
        """Brings back what is in host memory."""
        for tensor, size, _ in self._away:
            tensor.untyped_storage().resize_(size)
        if self._away and self._stream is not None:
            # Kernels that are queued may still use the memory that the state was just given.
            self._stream.wait_stream(torch.cuda.current_stream())
        for tensor, _, host in self._away:
            if tensor.is_cuda:
                with torch.cuda.stream(self._stream):  # after the copy that took it there
                    tensor.copy_(host, non_blocking=True)
                tensor.record_stream(self._stream)
            else:
                tensor.copy_(host)
            self._hosts.setdefault((tuple(host.shape), host.dtype), []).append(host)
        if self._away and self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        self._away = []

    def _tensors(self) -> Iterator[Tensor]:
        """Yields this rank's pieces of the state; counters stay."""
        for values in self._optimizer.state.values():
            for value in values.values():
                if not isinstance(value, Tensor) or value.numel() <= 1:
                    continue
                tensor = local_part(value)
                whole = tensor.untyped_storage()
                alone = tensor.numel() * tensor.element_size() == whole.nbytes() and tensor.is_contiguous()
                if tensor.device.type in offload.DEVICES and alone and whole.nbytes():
                    yield tensor

    def _host_like(self, tensor: Tensor) -> Tensor:
        free = self._hosts.get((tuple(tensor.shape), tensor.dtype))
        if free:
            return free.pop()
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)

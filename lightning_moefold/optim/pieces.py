# SPDX-License-Identifier: Apache-2.0
"""Optimizers that take all parameters in one call, as torch's do by default on CUDA, on parameters of all kinds.

``torch._foreach_*`` and ``torch._fused_*`` take lists. DTensor refuses a list that holds plain tensors beside DTensors, or
DTensors of two meshes; a module of the user's own beside a MoE layer has the one, and experts beside dense layers the other.
What treats elements one by one computes on this rank's pieces what it computes on the whole, so such calls are given the
pieces, and what they make anew becomes DTensors again. Nothing of torch is replaced: a dispatch mode is active while the
optimizer steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_moefold.optim.elementwise import combines
from lightning_moefold.optim.stepping import step_inside
from lightning_moefold.parallel.gradients import like

_MARK = "_moefold_on_pieces"


class _OnPieces(TorchDispatchMode):
    """Gives calls with lists of tensors the pieces of DTensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.rpartition("::")[2]
        if name.startswith(("_foreach_", "_fused_")):
            values = [*args, *kwargs.values()]
            models = _models([v for v in values if isinstance(v, (list, tuple))], alone=not combines(func))
            if models and not any(isinstance(v, DTensor) for v in values):
                with torch.no_grad():
                    found = func(*map(_pieces, args), **{key: _pieces(value) for key, value in kwargs.items()})
                    return _whole(found, models)
        return func(*args, **kwargs)


def _models(lists: Sequence[Sequence[Any]], alone: bool) -> dict[int, DTensor]:
    """By place in the lists, a DTensor that all tensors at that place are stored like.

    Args:
        lists: Of one call; the entries of one place belong together.
        alone: Whether the call treats elements one by one; if not, pieces do only where each is the whole.

    Returns:
        Nothing where the pieces would not do, and DTensor has to decide.
    """
    models: dict[int, DTensor] = {}
    for values in lists:
        for place, value in enumerate(values):
            if not isinstance(value, DTensor):
                continue
            model = models.setdefault(place, value)
            if model.device_mesh != value.device_mesh or model.placements != value.placements:
                return {}
            if any(placement.is_partial() for placement in value.placements):
                return {}
            if not alone and value.device_mesh.size() > 1:
                return {}
    plain = (v for values in lists for i, v in enumerate(values) if i in models and isinstance(v, Tensor))
    # Beside a DTensor, a plain tensor may be a step counter; of what part of the whole it would be is not known otherwise.
    if any(v.numel() != 1 for v in plain if not isinstance(v, DTensor)):
        return {}
    return models


def _pieces(value: Any) -> Any:
    if not isinstance(value, (list, tuple)):
        return value
    return [x.to_local() if isinstance(x, DTensor) else x for x in value]


def _whole(found: Any, models: dict[int, DTensor]) -> Any:
    """What a call has made, stored as its lists are."""
    if not isinstance(found, (list, tuple)):
        return found
    return type(found)(
        like(models[i], x) if i in models and isinstance(x, Tensor) and x.shape == models[i].to_local().shape else x
        for i, x in enumerate(found)
    )


def run_on_pieces(optimizer: Optimizer) -> None:
    """Lets ``step`` and ``zero_grad`` of this optimizer take lists of parameters of all kinds.

    Args:
        optimizer: Its own methods are replaced; its class, and torch, stay as they are.
    """
    if getattr(optimizer.step, _MARK, False):
        return
    for name in ("step", "zero_grad"):
        setattr(optimizer, name, _on_pieces(optimizer, name))


def _on_pieces(optimizer: Optimizer, name: str) -> MethodType:
    method = getattr(optimizer, name)
    if name == "step":
        inside = step_inside(method, _OnPieces())
    else:

        def inside(*args: Any, **kwargs: Any) -> Any:
            with _OnPieces():
                return method(*args, **kwargs)

    # A bound method, as schedulers expect who wrap it.
    def bound(_: Optimizer, *args: Any, **kwargs: Any) -> Any:
        return inside(*args, **kwargs)

    vars(bound)[_MARK] = True
    vars(bound).update({k: v for k, v in vars(method).items() if k == "_wrapped_by_lr_sched"})
    return MethodType(bound, optimizer)

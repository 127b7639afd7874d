# SPDX-License-Identifier: Apache-2.0
"""Lets optimizers that pass all parameters to one call, as torch's do by default on CUDA, mix all kinds of parameters.

``torch._foreach_*`` and ``torch._fused_*`` take lists. DTensor refuses a list that mixes plain tensors with DTensors (a
user's module beside a MoE layer), or DTensors of two meshes (experts beside dense layers). An elementwise operation
gives the same result on this rank's pieces as on whole tensors. So these calls receive the pieces, and their new
results become DTensors again. Nothing of torch is replaced: a dispatch mode is active while the optimizer steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType, MethodType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_moefold.optim.elementwise import combines
from lightning_moefold.optim.master_weights import MasterWeights
from lightning_moefold.optim.muon import Muon
from lightning_moefold.optim.stepping import step_inside
from lightning_moefold.parallel.gradients import like

_MARK = "_moefold_on_pieces"


class _OnPieces(TorchDispatchMode):
    """Replaces the DTensors in calls with lists of tensors by this rank's pieces."""

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
    """Finds, for each index of the lists, a DTensor that is stored like all tensors at that index.

    Args:
        lists: The lists of one call; entries with the same index belong together.
        alone: Whether the call is elementwise; if not, pieces are correct only if each is the whole tensor.

    Returns:
        The DTensors by index; empty if pieces would be wrong, so that DTensor handles the call.
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
    # Beside a DTensor, a plain tensor may only be a step counter: of another one, the part it stands for is unknown.
    if any(v.numel() != 1 for v in plain if not isinstance(v, DTensor)):
        return {}
    return models


def _pieces(value: Any) -> Any:
    if not isinstance(value, (list, tuple)):
        return value
    return [x.to_local() if isinstance(x, DTensor) else x for x in value]


def _whole(found: Any, models: dict[int, DTensor]) -> Any:
    """Converts the results of a call to DTensors that are stored like its lists."""
    if not isinstance(found, (list, tuple)):
        return found
    return type(found)(
        like(models[i], x) if i in models and isinstance(x, Tensor) and x.shape == models[i].to_local().shape else x
        for i, x in enumerate(found)
    )


def run_on_pieces(optimizer: Optimizer, names: Mapping[int, str] = MappingProxyType({})) -> None:
    """Lets ``step`` and ``zero_grad`` of this optimizer use lists of parameters of all kinds.

    Args:
        optimizer: The optimizer; its bound methods are replaced, its class and torch are not changed.
        names: Names of the parameters by ``id``, for optimizers that need them.
    """
    if isinstance(optimizer, (Muon, MasterWeights)):
        optimizer.learn_names(names)
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

    # A bound method, because schedulers wrap it and expect one.
    def bound(_: Optimizer, *args: Any, **kwargs: Any) -> Any:
        return inside(*args, **kwargs)

    vars(bound)[_MARK] = True
    vars(bound).update({k: v for k, v in vars(method).items() if k == "_wrapped_by_lr_sched"})
    return MethodType(bound, optimizer)

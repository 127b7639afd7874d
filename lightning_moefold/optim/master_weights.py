# SPDX-License-Identifier: Apache-2.0
"""An optimizer that keeps float32 copies of 16-bit weights and updates those."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_moefold.optim.muon import Muon
from lightning_moefold.parallel import local_part

_MASTER = "master"


class MasterWeights(Optimizer):
    """Runs an optimizer on float32 masters of the parameters and rounds them into the parameters after each step.

    Use it for weights stored in bfloat16 (``precision="bf16-true"``), where most updates are smaller than the spacing
    of bfloat16 numbers and would be lost. Masters are stored like their parameters: each rank has those of its pieces.
    They are saved in checkpoints as ``master`` and resume under any fold. Parameters in float32 or wider are their own
    masters.

    Per parameter, a rank holds 2 bytes of weight, 2 of gradient, 4 of master and, with AdamW, 8 of state. During the
    step it holds 4 more bytes for the gradient in float32.

    Args:
        optimizer_class: Class of an elementwise optimizer, such as ``torch.optim.AdamW``, or :class:`~.muon.Muon`.
        params: Parameters or parameter groups, as for ``optimizer_class``.
        **kwargs: Further arguments of ``optimizer_class``.

    Attributes:
        inner: The optimizer that updates the masters.

    Example::

        def configure_optimizers(self):
            return MasterWeights(torch.optim.AdamW, self.parameters(), lr=1e-5, fused=True)
    """

    def __init__(self, optimizer_class: Callable[..., Optimizer], params: Iterable[Any], **kwargs: Any) -> None:
        super().__init__(params, {})
        self._masters = {p: _make_master(p) for group in self.param_groups for p in group["params"]}
        groups = [{**g, "params": [self._masters[p] for p in g["params"]]} for g in self.param_groups]
        self.inner = optimizer_class(groups, **kwargs)
        self.defaults = self.inner.defaults
        _copy_options(self.inner, self)

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if hasattr(self, "inner"):
            raise NotImplementedError("MasterWeights takes all parameter groups when it is made; add none later.")
        super().add_param_group(param_group)

    def learn_names(self, names: Mapping[int, str]) -> None:
        """Tells an optimizer that needs names (:class:`~.muon.Muon`) those of the masters; the strategy calls it."""
        if isinstance(self.inner, Muon):
            self.inner.learn_names({id(m): names[id(p)] for p, m in self._masters.items() if id(p) in names})

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Schedulers change the groups of this optimizer, and a checkpoint restores its state here.
        _copy_options(self, self.inner)
        for parameter, master in self._masters.items():
            self._hand_in(parameter, master)
        self.inner.step()
        _copy_options(self.inner, self)  # some count steps there
        for parameter, master in self._masters.items():
            self._hand_back(parameter, master)
        return loss

    def _hand_in(self, parameter: nn.Parameter, master: nn.Parameter) -> None:
        state = dict(self.state.get(parameter, {}))
        stored = state.pop(_MASTER, None)
        if master is not parameter:
            # Without a stored master (at the first step), the master is the current weight, which a checkpoint may have
            # changed since the optimizer was created.
            source = parameter if stored is None else stored
            if source is not master:
                local_part(master).copy_(local_part(source))
            master.grad = None if parameter.grad is None else parameter.grad.to(master.dtype)
        if state:
            self.inner.state[master] = state

    def _hand_back(self, parameter: nn.Parameter, master: nn.Parameter) -> None:
        state = self.inner.state.get(master, {})
        if master is parameter:
            if state:
                self.state[parameter] = state
            return
        if master.grad is not None:
            local_part(parameter).copy_(local_part(master))
            master.grad = None
            self.state[parameter] = {**state, _MASTER: master}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # torch has rounded the state to the parameters' dtype, so it is copied again.
        numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        for number, parameter in zip(numbers, parameters, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    self.state[parameter][key] = value.detach().to(parameter.device, copy=True)


def _copy_options(source: Optimizer, target: Optimizer) -> None:
    for ours, theirs in zip(source.param_groups, target.param_groups, strict=True):
        theirs.update({key: value for key, value in ours.items() if key != "params"})


def _make_master(parameter: nn.Parameter) -> nn.Parameter:
    if not parameter.is_floating_point() or parameter.dtype.itemsize >= 4:
        return parameter
    return nn.Parameter(parameter.detach().float(), requires_grad=parameter.requires_grad)

# SPDX-License-Identifier: Apache-2.0
"""Finds the first module of a network whose output, or the gradient of whose input, is not finite on this rank.

The search watches one forward and backward pass by hooks: it reads every output and waits for the device each time, so it is
used after a failure, on a batch that is run again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_moefold.parallel.gradients import local_part

#: Families by a part of a module's or parameter's name; the first that fits.
_FAMILIES = (
    ("shared_expert", "shared expert"),
    ("experts", "experts"),
    ("gate", "router"),
    ("attn", "attention"),
    ("attention", "attention"),
    ("norm", "norm"),
    ("embed", "embedding"),
    ("head", "head"),
    ("mlp", "feed-forward"),
)


@dataclass(frozen=True)
class Place:
    """Where a number that is not finite was first seen.

    Args:
        what: ``"weight"``, ``"output"``, ``"gradient of the input"`` or ``"gradient of the output"``.
        name: Name of the parameter or module in the LightningModule.
        order: Number of the module's call in the pass; 0 for a weight.
    """

    what: str
    name: str
    order: int = 0

    @property
    def layer(self) -> int | None:
        """Number of the layer in the whole model; None outside of the layers."""
        return layer_of(self.name)

    @property
    def family(self) -> str:
        """Kind of the module: ``"attention"``, ``"experts"``, ``"router"``, ``"embedding"`` and so on."""
        return family_of(self.name)

    def key(self, staged: bool) -> tuple[int, float, int]:
        """Sorts places of several ranks by the way of the data: weights, forward, backward.

        Where ranks are ``staged`` they hold different layers, so that the numbers of their calls cannot be compared.
        """
        phase = {"weight": 0, "output": 1}.get(self.what, 2)
        layer = float("inf") if self.layer is None else float(self.layer)
        if self.layer is None and "embed" in self.name:
            layer = -1.0
        return phase, (layer if phase < 2 else -layer) if staged else 0.0, self.order


def layer_of(name: str) -> int | None:
    """Returns the first number in a dotted name, which is that of a layer."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return None if found is None else int(found[1])


def family_of(name: str) -> str:
    """Returns the family of a module or parameter by its name; ``"module"`` for one of the user's own."""
    parts = [part for part in name.split(".") if part not in ("model", "weight", "bias")]
    for part in reversed(parts):
        for key, family in _FAMILIES:
            if key in part and not (key == "gate" and part != "gate"):
                return family
    return "module"


@torch.no_grad()  # a check that autograd sees keeps tensors for backward, which recomputation then misses in its second run
def all_finite(tensors: Iterable[Tensor]) -> Tensor | None:
    """Returns whether all numbers of the floating-point ``tensors`` are finite, a bool on their device; None without any."""
    members = [t for t in tensors if t.is_floating_point() and t.numel()]
    if not members:
        return None
    # One pass over each, in which NaN and inf stay what they are. On CPU the maximum norm is five times slower than extremes.
    device = next((t.device for t in members if t.device.type != "cpu"), members[0].device)
    ends = [end for t in members if t.device.type == "cpu" for end in t.aminmax()]
    if on_device := [t for t in members if t.device.type != "cpu"]:
        ends += torch._foreach_norm(on_device, float("inf"))
    return torch.stack([end.double().to(device) for end in ends]).isfinite().all()


def bad_tensors(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Returns the names of those tensors whose pieces on this rank hold a number that is not finite."""
    pieces = {name: local_part(tensor) for name, tensor in named}
    everything = all_finite(pieces.values())  # waits for the device once
    if everything is None or bool(everything):
        return []
    return [name for name, piece in pieces.items() if not _finite(piece)]


def _finite(tensor: Tensor) -> bool:
    found = all_finite([tensor])
    return found is None or bool(found)


class Search:
    """Watches a pass of a network. Use as ``with watching(network) as search``.

    Attributes:
        forward: First module whose output was not finite; None if all were.
    """

    def __init__(self) -> None:
        self.forward: Place | None = None
        self._calls = 0
        self._outside: set[str] = set()  # modules whose output received a bad gradient
        self._backward: list[tuple[Place, bool]] = []

    @property
    def place(self) -> Place | None:
        """The first bad number: forward, else the module that turned a finite gradient into one that is not."""
        if self.forward is not None:
            return self.forward
        made = [place for place, received in self._backward if place.what.endswith("input") and not received]
        return made[0] if made else next((place for place, _ in self._backward), None)

    def after(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Forward hook of a module."""
        self._calls += 1
        order, outputs = self._calls, list(_tensors(output))
        if self.forward is None and not all(_finite(t) for t in outputs):
            self.forward = Place("output", name, order)
        if torch.is_grad_enabled():
            for tensor in outputs:
                if tensor.requires_grad:
                    tensor.register_hook(partial(self._arrived, Place("gradient of the output", name, -order)))
            for tensor in _tensors((args, kwargs)):
                if tensor.requires_grad:
                    tensor.register_hook(partial(self._arrived, Place("gradient of the input", name, -order)))

    def _arrived(self, place: Place, gradient: Tensor) -> None:
        if not _finite(gradient):
            self._backward.append((place, place.name in self._outside))
            if place.what.endswith("output"):
                self._outside.add(place.name)


@contextmanager
def watching(network: nn.Module) -> Iterator[Search]:
    """A context in which the passes of ``network`` are searched; compiled modules run as they are."""
    search, handles = Search(), []
    compiled = {m: m._compiled_call_impl for m in network.modules() if m._compiled_call_impl is not None}
    for module in compiled:
        module._compiled_call_impl = None
    for name, module in network.named_modules():
        if name:
            handles.append(module.register_forward_hook(partial(search.after, name), with_kwargs=True))
    try:
        yield search
    finally:
        for handle in handles:
            handle.remove()
        for module, call in compiled.items():
            module._compiled_call_impl = call


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yields the floating-point tensors in a value, in containers, and directly in a dataclass or named tuple.

    Rows that are still under way from another rank are left out.
    """
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif hasattr(value, "_fields"):
        if getattr(value, "handle", None) is None:
            yield from (t for t in value if isinstance(t, Tensor) and t.is_floating_point())
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from (
            t for f in fields(value) if isinstance(t := getattr(value, f.name), Tensor) and t.is_floating_point()
        )

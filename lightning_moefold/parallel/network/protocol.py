# SPDX-License-Identifier: Apache-2.0
"""Custom networks that say where their layers are, so that a pipeline can cut them and cp their rows.

    class Network(nn.Module):
        pipeline_layers = "blocks"                     # a ModuleList, Sequential or ModuleDict

        def embed(self, batch): ...                    # -> hidden states [rows, ...]
        def head(self, hidden, batch): ...             # -> a loss, (sum, weight), or in evaluation an output

Each layer takes the hidden states and returns as many.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_moefold.errors import InputError, InputTypeError
from lightning_moefold.modules.base import ParallelRoot

_LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


class MissingLayer(nn.Module):
    """Stands for a layer that another pipeline stage holds."""

    def forward(self, *_: Any) -> Any:
        """Cannot run.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError("this layer is on another pipeline stage; call the network, which runs all of its layers.")


@dataclass(frozen=True)
class LayeredNetwork:
    """A network that follows the protocol, and its name in the LightningModule, which may be empty."""

    name: str
    module: nn.Module

    @property
    def layers_name(self) -> str:
        """What its ``pipeline_layers`` says."""
        return str(self.module.pipeline_layers)

    @property
    def container(self) -> nn.Module:
        """The list of its layers.

        Raises:
            ValueError: If there is no such list, or it is empty.
        """
        try:
            container = self.module.get_submodule(self.layers_name)
        except AttributeError:
            container = None
        if not self.layers_name or not isinstance(container, _LISTS) or not len(container):
            raise InputError(
                f"pipeline_layers={self.layers_name!r} of {type(self.module).__name__} names no list of layers; name a ModuleList, "
                "Sequential or ModuleDict that holds them."
            )
        return container

    def layers(self) -> dict[str, nn.Module]:
        """By their names in the list, in order."""
        return {name: layer for name, layer in self.container._modules.items() if layer is not None}

    def ends(self) -> list[nn.Module]:
        """All modules but the layers and what is in them."""
        inside = {id(m) for m in self.container.modules()}
        return [m for m in self.module.modules() if id(m) not in inside]

    def blocks(self) -> list[ParallelRoot]:
        """All blocks in its layers, those inside others too."""
        return [m for m in self.container.modules() if isinstance(m, ParallelRoot)]

    def embed(self, batch: Any) -> Tensor:
        """Before the first layer."""
        return self.module.embed(batch)  # type: ignore[operator]

    def head(self, hidden: Tensor, batch: Any) -> Any:
        """After the last one."""
        return self.module.head(hidden, batch)  # type: ignore[operator]


def layered_networks(root: nn.Module) -> list[LayeredNetwork]:
    """The networks in a module that follow the protocol; those inside others are parts of them."""
    found: list[LayeredNetwork] = []
    inside: set[int] = set()
    for name, module in root.named_modules():  # outer ones first
        ends: list[Callable[..., Any] | None] = [getattr(module, end, None) for end in ("embed", "head")]
        if isinstance(getattr(module, "pipeline_layers", None), str) and all(map(callable, ends)):
            if id(module) not in inside:
                found.append(LayeredNetwork(name, module))
            inside |= {id(m) for m in module.modules()}
    return found


# ---- what the ends return ----------------------------------------------------------------------------------------------

#: What a head returned.
LOSS, RATIO, OUTPUT = 1, 2, 3


class Found(NamedTuple):
    """What the head said of a micro-batch.

    Args:
        kind: :data:`LOSS`, :data:`RATIO` or :data:`OUTPUT`.
        total: The loss, or the sum of losses; zero for an output.
        weight: What sums are divided by; one for the rest.
        output: An output.
    """

    kind: int
    total: Tensor
    weight: Tensor
    output: Tensor | None = None


def check_shape(x_R: Any, expected: tuple[int, ...]) -> None:
    """Raises a ValueError unless ``embed`` returned hidden states of this shape."""
    if not isinstance(x_R, Tensor) or tuple(x_R.shape) != expected:
        what = list(x_R.shape) if isinstance(x_R, Tensor) else type(x_R).__name__
        raise InputError(
            f"embed must return hidden states with an entry for each row of the batch, of one shape: {list(expected)} here, "
            f"not {what}."
        )


def is_ratio(result: Any) -> bool:
    """Whether a head returned a sum of losses and what to divide it by."""
    pair = isinstance(result, (tuple, list)) and len(result) == 2
    return pair and isinstance(result[0], Tensor) and result[0].dim() == 0


def read_head(result: Any, rows: int) -> Found:
    """Makes out what a head returned for ``rows`` rows.

    Raises:
        TypeError: If that is nothing a pipeline can put together again.
    """
    if isinstance(result, Tensor) and result.dim() == 0:
        return Found(LOSS, result, result.new_ones(()))
    if is_ratio(result):
        return Found(RATIO, result[0], torch.as_tensor(result[1], dtype=torch.float64, device=result[0].device))
    if isinstance(result, Tensor) and result.shape[0] == rows:
        return Found(OUTPUT, torch.zeros((), device=result.device), torch.ones((), device=result.device), result)
    what = f"a tensor of shape {list(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
    raise InputTypeError(
        "head must return a loss (a scalar, the mean over rows), a pair (sum, weight) of scalars or, in evaluation, a tensor with "
        f"an entry for each row; it returned {what} for {rows} rows."
    )

# SPDX-License-Identifier: Apache-2.0
"""What every block has in common: it states how its parameters are cut, and learns the axes it computes over."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from lightning_moefold.fold import Fold
from lightning_moefold.layout import ParameterPlan
from lightning_moefold.mesh import FoldedMesh


class ParallelModule(nn.Module):
    """A block with parallel parameters. Outside a strategy it is a plain module on one rank."""

    def plans(self, fold: Fold) -> dict[str, ParameterPlan]:
        """How ``fold`` treats each parameter of this block, by name relative to it.

        A parameter that is not listed (here or in a nested block) is replicated, with gradients summed over tp: right
        for everything that acts on a token at a time under sequence parallelism.
        """
        return {}

    def bind(self, mesh: FoldedMesh) -> None:
        """Hands the block its axes; called once, when the strategy parallelises the model."""


class Linear(nn.Module):
    """``y = x W^T + b`` on the local part of a weight ``[out, in]`` that may be stored as a DTensor."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in] -> [..., out]`` (local sizes)."""
        return F.linear(x, local(self.weight), None if self.bias is None else local(self.bias))


def local(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter as a plain tensor.

    The gradient takes the placements of the parameter itself. For a replicated parameter with a *partial* gradient this
    leaves the sum over tp undone on purpose: all of them are summed in one collective after backward
    (:class:`~lightning_moefold.parallel.gradients.GradientSum`) instead of one small one each.
    """
    if isinstance(parameter, DTensor):
        return parameter.to_local(grad_placements=parameter.placements)
    return parameter


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype for numerically delicate steps: float32, or wider if the input is."""
    return torch.promote_types(torch.float32, dtype)

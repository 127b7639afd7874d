# SPDX-License-Identifier: Apache-2.0
"""What an optimizer of a language model is given: groups of parameters, and a schedule of its learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

Schedule = Literal["cosine", "linear", "constant"]


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices, none for norms and biases; frozen parameters are left out."""
    groups: dict[bool, list[nn.Parameter]] = {}
    for parameter in module.parameters():
        if parameter.requires_grad:
            groups.setdefault(parameter.ndim >= 2, []).append(parameter)
    return [{"params": group, "weight_decay": weight_decay * matrix} for matrix, group in sorted(groups.items())]


def warmup_and_decay(
    optimizer: Optimizer, warmup: int, total: Callable[[], int], decay: Schedule = "cosine", floor: float = 0.1
) -> LambdaLR:
    """A linear rise over ``warmup`` steps, then a fall to ``floor`` times the learning rate at step ``total()``.

    Args:
        optimizer: Whose learning rate it is.
        warmup: Steps of the rise.
        total: Gives the number of steps of the run; not asked before the first step has been made.
        decay: Shape of the fall; ``"constant"`` for none.
        floor: Where it ends.
    """

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if step == 0 or decay == "constant":
            return 1.0
        progress = min(1.0, (step - warmup) / max(1, total() - warmup))
        shape = (1 + math.cos(math.pi * progress)) / 2 if decay == "cosine" else 1 - progress
        return floor + (1 - floor) * shape

    return LambdaLR(optimizer, factor)

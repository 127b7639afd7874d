# SPDX-License-Identifier: Apache-2.0
"""What an optimizer of a language model is given: groups of parameters, and a schedule of its learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_moefold.errors import InputError

Schedule = Literal["cosine", "linear", "constant"]


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices, none for norms and biases; frozen parameters are left out."""
    groups: dict[bool, list[nn.Parameter]] = {}
    for parameter in module.parameters():
        if parameter.requires_grad:
            groups.setdefault(parameter.ndim >= 2, []).append(parameter)
    return [{"params": group, "weight_decay": weight_decay * matrix} for matrix, group in sorted(groups.items())]


def run_length(trainer: pl.Trainer) -> int:
    """Optimizer steps of a run of ``trainer.fit``, once its loaders are made.

    Raises:
        InputError: If nothing says how many they are: an endless number of epochs, or a stream that has no length.
    """
    batches, epochs, total = trainer.num_training_batches, trainer.max_epochs, trainer.max_steps
    if epochs is not None and epochs >= 0 and batches != math.inf:
        accumulated = [trainer.accumulate_grad_batches] * max(epochs, 1)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, GradientAccumulationScheduler):
                accumulated = [callback.get_accumulate_grad_batches(epoch) for epoch in range(len(accumulated))]
        of_epochs = sum(math.ceil(batches / count) for count in accumulated)
        total = of_epochs if total < 0 else min(total, of_epochs)
    if total < 0:
        why = "the training data has no length" if batches == math.inf else f"max_epochs={epochs} is endless"
        raise InputError(
            f"the learning rate falls until the end of the run, which is not known as {why}; set max_steps of the Trainer, "
            "total_steps of the module, or schedule='constant'."
        )
    return total


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

# SPDX-License-Identifier: Apache-2.0
"""Token dropping in Hugging Face's code, token by token: the oracle for capacities, written only from their definition.

Legend: B rows, S positions, K experts per token.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn


class DroppingReference:
    """Makes a model of :func:`.hf_reference` drop tokens: a choice whose expert is full gets weight zero.

    Each expert serves ``min(L, ceil(capacity_factor * k * L / E))`` tokens of a row of L tokens (without padding). By
    probability, these are the tokens whose first 26 bits are highest, then the earlier positions.

    Args:
        model: The model; hooks are added to it.
        capacity_factor: Capacity factor of :class:`.DispatchConfig`.
        policy: ``drop_policy`` of :class:`.DispatchConfig`.

    Attributes:
        dropped: Number of dropped choices so far.
    """

    def __init__(self, model: nn.Module, capacity_factor: float, policy: Literal["probs", "position"]) -> None:
        self.factor, self.policy, self.dropped = capacity_factor, policy, 0
        self._mask_BS: Tensor | None = None
        model.register_forward_pre_hook(self._look_at_batch, with_kwargs=True)
        for module in model.modules():
            if type(module).__name__.endswith("TopKRouter"):
                module.register_forward_hook(self._drop)

    def _look_at_batch(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        self._mask_BS = torch.ones_like(kwargs["input_ids"]) if mask is None else mask

    def _drop(self, router: nn.Module, _: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits, weight_NK, expert_NK = output
        assert self._mask_BS is not None
        probability_NE = logits.detach().double().softmax(-1)
        rows, length = self._mask_BS.shape
        keep_NK = torch.zeros_like(weight_NK)
        for row in range(rows):
            tokens = [row * length + s for s in range(length) if self._mask_BS[row, s]]
            experts, k = probability_NE.shape[1], expert_NK.shape[1]
            room = min(len(tokens), math.ceil(self.factor * k * len(tokens) / experts))
            for expert in range(experts):
                waiting = [(n, j) for n in tokens for j in range(k) if int(expert_NK[n, j]) == expert]
                if self.policy == "probs":
                    waiting.sort(key=lambda choice: (-_half(float(probability_NE[choice[0], expert])), choice[0]))
                for n, j in waiting[:room]:
                    keep_NK[n, j] = 1
                self.dropped += len(waiting[room:])
        return logits, weight_NK * keep_NK, expert_NK


def _half(number: float) -> float:
    """Rounds a double to half of its bits."""
    fraction, exponent = math.frexp(number)
    return math.ldexp(round(fraction * 2**26), exponent - 26)

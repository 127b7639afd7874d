# SPDX-License-Identifier: Apache-2.0
"""A router of a user's own, in the few lines that it takes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_moefold.modules import Router, RouterOptions, register_router


@dataclass(frozen=True, kw_only=True)
class TemperedOptions(RouterOptions):
    name: str = "tempered"
    temperature: float = 2.0


@register_router("tempered")
class TemperedRouter(Router):
    Options = TemperedOptions

    def scores(self, logits_TE: Tensor) -> Tensor:
        return (logits_TE / self.options.temperature).softmax(-1)

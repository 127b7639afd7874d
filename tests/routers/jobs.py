# SPDX-License-Identifier: Apache-2.0
"""What a rank of the pool does in the tests of routers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_moefold.testing import Batch
from tests.exactness import runs
from tests.routers import own  # noqa: F401  (registers a router)


@dataclass
class RouterRun(runs.RankRun):
    """What one rank saw of the routers."""

    z_losses: list[float] = field(default_factory=list)
    bias: dict[int, Tensor] = field(default_factory=dict)


class RouterCase(runs.Case):
    """Trains on ``output.loss``."""

    def training_step(self, batch: Batch, _: int) -> Tensor:
        output = self.model(**batch)
        self.run.losses.append(output.loss.item())
        self.run.aux_losses.append(math.nan if output.aux_loss is None else output.aux_loss.item())
        self.run.z_losses.append(math.nan if output.z_loss is None else output.z_loss.item())
        if self.spec.get("look"):  # neither is learned from
            with torch.no_grad():
                self.model(**batch)
            self.model.eval()(**batch)
            self.model.train()
        return output.loss


def train(path: str, fold: str, batches: list[list[Batch]], spec: dict[str, Any]) -> RouterRun:
    """Trains on ``batches[step][data rank]``."""
    run = RouterRun()
    module = RouterCase(path, run, spec)
    runs._fit(module, fold, batches, spec)
    run.weights = runs.owned_pieces(module.model)
    gates = {number: layer.gate for number, layer in module.model.moe_layers().items()}
    run.bias = {i: g.e_score_correction_bias.clone() for i, g in gates.items() if g.e_score_correction_bias is not None}
    run.loads = {i: layer.load_E.clone() for i, layer in module.model.moe_layers().items()}
    return run

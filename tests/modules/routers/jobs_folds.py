# SPDX-License-Identifier: Apache-2.0
"""What a rank of the pool does in the tests of routers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_moefold import Fold, MoEFoldStrategy
from lightning_moefold.testing import Batch, PoolEnvironment
from tests.exactness import runs
from tests.modules.routers import custom_router  # noqa: F401  (registers a router)


@dataclass
class RouterRun(runs.RankRun):
    """What one rank saw of the routers."""

    z_losses: list[float] = field(default_factory=list)
    bias: dict[int, Tensor] = field(default_factory=dict)
    counts: list[dict[int, Tensor]] = field(default_factory=list)


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

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        gates = {number: layer.gate for number, layer in self.model.moe_layers().items()}
        self.run.counts.append({i: gate.counts_E.clone() for i, gate in gates.items() if gate.learns_bias})


def stop_and_resume(
    path: str, folds: list[str], batches: list[list[Batch]], spec: dict[str, Any], checkpoint: str, exported: str
) -> RouterRun:
    """One step under each fold, from the checkpoint of the one before; at last a Hugging Face directory."""
    world = dist.get_world_size()
    for index, fold in enumerate(folds):
        run = RouterRun()
        module = RouterCase(path, run, spec)
        rank = Fold.parse(fold, world).coordinates(dist.get_rank())["dp"]
        trainer = pl.Trainer(
            accelerator="cpu", devices=world, plugins=[PoolEnvironment()], precision="64-true", max_epochs=index + 1,
            strategy=MoEFoldStrategy(fold=fold, num_microbatches=2, pipeline_schedule="gpipe"), logger=False,
            use_distributed_sampler=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        )  # fmt: skip
        loader = DataLoader(runs.BatchList([batches[index][rank]]), batch_size=None)
        trainer.fit(module, loader, ckpt_path=None if index == 0 else checkpoint)
        trainer.save_checkpoint(checkpoint)
    module.model.save_pretrained(exported)
    run.weights = runs.owned_pieces(module.model)
    run.bias = _biases(module)
    return run


def _biases(module: RouterCase) -> dict[int, Tensor]:
    gates = {number: layer.gate for number, layer in module.model.moe_layers().items()}
    return {i: g.e_score_correction_bias.clone() for i, g in gates.items() if g.e_score_correction_bias is not None}


def train(path: str, fold: str, batches: list[list[Batch]], spec: dict[str, Any]) -> RouterRun:
    """Trains on ``batches[step][data rank]``."""
    run = RouterRun()
    module = RouterCase(path, run, spec)
    runs._fit(module, fold, batches, spec)
    run.weights = runs.owned_pieces(module.model)
    run.bias = _biases(module)
    layers = module.model.moe_layers()
    run.loads = {i: layer.load_E.clone() for i, layer in layers.items()}
    run.dropped = sum(int(layer.dropped) for layer in layers.values())
    return run

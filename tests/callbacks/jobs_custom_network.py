# SPDX-License-Identifier: Apache-2.0
"""Monitored networks of a user's own, in one rank of the pool.

Legend: L layers, E experts.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_moefold import Fold, MoEFoldStrategy
from lightning_moefold.callbacks import LoadBalanceMonitor
from lightning_moefold.callbacks.expert_load import LoadReader
from lightning_moefold.callbacks.summary import summarize_model
from lightning_moefold.modules import MoELayer
from lightning_moefold.parallel import local_part
from lightning_moefold.plots.files import NO_EXPERT
from lightning_moefold.testing import PoolEnvironment
from tests.callbacks.jobs_monitors import Seen


class OwnNetwork(pl.LightningModule):
    """Two layers of 4 and 2 experts with something ordinary between them. Its weights stay as they are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.between, self.second = MoELayer(8, 4, 2, 8), nn.BatchNorm1d(8), MoELayer(8, 2, 1, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x + self.first(x)) + 0 * self.between(x)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return self(batch[0][0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def own_network_counts(batches: Tensor) -> np.ndarray:
    """How often a single process chooses each expert over all batches, ``[L, E]``."""
    module = OwnNetwork().double()
    module(batches.flatten(0, -2))
    return np.stack([module.first.load_E.numpy(), [*module.second.load_E.tolist(), NO_EXPERT, NO_EXPERT]])


def own_network_fit(fold: str | None, batches: Tensor, root: str) -> Seen:
    """Trains on ``batches[step][part]``, the parts dealt to the data ranks; under DDP if there is no fold."""
    world, monitor, module = dist.get_world_size(), LoadBalanceMonitor(), OwnNetwork()
    parsed = Fold.parse(fold or "", world)
    share, place = batches.shape[1] // parsed.dp, parsed.coordinates(dist.get_rank())["dp"]
    mine = batches[:, place * share : (place + 1) * share].flatten(1, 2)
    environment = PoolEnvironment()
    strategy: Any = DDPStrategy(process_group_backend="gloo") if fold is None else MoEFoldStrategy(fold=fold)
    trainer = pl.Trainer(
        accelerator="cpu", devices=world, strategy=strategy, plugins=[environment], precision="64-true", max_epochs=1,
        log_every_n_steps=len(batches), use_distributed_sampler=False, enable_progress_bar=False, logger=False,
        enable_model_summary=False, enable_checkpointing=False, callbacks=[monitor], default_root_dir=root,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(mine), batch_size=1))
    stored = sum(local_part(p).numel() for p in module.parameters())
    size_range = summarize_model(module, parsed if fold is not None else Fold(1)).size_range()
    return Seen(load=[monitor.latest], history=monitor.history, stored=stored, stored_range=size_range)


def uneven_table(holds: list[list[str]]) -> tuple[list[str], list[int], list[list[int]], list[int]]:
    """The table that ranks make who hold different layers: names held here, numbers, counts and drops.

    Layers have two experts, and ``blocks.2`` three. Each rank has counted as many choices of each expert, and drops, as
    its number from one; whoever holds ``blocks.10`` is rank zero.
    """
    rank = dist.get_rank()
    layers = {name: MoELayer(4, 3 if name == "blocks.2" else 2, 1, 4) for name in holds[rank]}
    root = pl.LightningModule()
    root.blocks = nn.ModuleDict({n.removeprefix("blocks."): m for n, m in layers.items() if n.startswith("blocks.")})
    if "head" in layers:
        root.head = layers["head"]
    trainer: Any = SimpleNamespace(
        world_size=dist.get_world_size(), global_rank=rank, strategy=SimpleNamespace(root_device=torch.device("cpu"))
    )
    reader = LoadReader(trainer, root)
    for layer in layers.values():
        layer.load_E += rank + 1
        layer.dropped_E[0] += rank + 1
    load = reader.read()
    names = {id(module): name for name, module in layers.items()}
    return (
        [names.get(id(row.module), "") for row in load.rows], [row.layer for row in load.rows],
        load.counts_LE.tolist(), load.dropped_LE.sum(1).tolist(),
    )  # fmt: skip

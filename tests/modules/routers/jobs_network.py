# SPDX-License-Identifier: Apache-2.0
"""Routers, their losses and biases in a network of a user's own: under a fold, and in a plain loop in one process."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_moefold import Fold, MoEFoldStrategy
from lightning_moefold.modules import (
    MoELayer,
    RouterOptions,
    TopologyAwareOptions,
    load_balancing_loss,
    router_z_loss,
    update_expert_bias,
)
from lightning_moefold.modules.routers import RouterOutput, RouterSpec
from lightning_moefold.testing import PoolEnvironment
from lightning_moefold.testing.pieces import Piece, owned_pieces
from tests.exactness.runs import BatchList

SIZE = 6


#: Of the two layers of a network.
ROUTERS: dict[str, tuple[RouterSpec, RouterSpec]] = {
    "tokens": (
        RouterOptions(
            score_function="sigmoid", routed_scaling_factor=1.5, n_group=2, topk_group=1, bias_update_rate=0.02,
            input_jitter=0.1, seed=1,
        ),
        {"bias_update_rate": 0.01},
    ),
    "rows": (
        TopologyAwareOptions(nodes=2, far_fraction=0.3, bias_update_rate=0.02),
        {"name": "swipe", "input_jitter": 0.1, "bias_update_rate": 0.01},
    ),
}  # fmt: skip


class Network(nn.Module):
    """Two MoE layers with routers of different kinds."""

    def __init__(self, routers: str) -> None:
        super().__init__()
        first, second = ROUTERS[routers]
        self.first = MoELayer(SIZE, 8, 3, 4, router=first, keep_routing=True)
        self.second = MoELayer(SIZE, 4, 2, 4, router=second, keep_routing=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x + self.first(x))

    def biases(self) -> list[list[float]]:
        return [layer.gate.e_score_correction_bias.tolist() for layer in (self.first, self.second)]


def objective(network: Network, x: Tensor) -> Tensor:
    task = (network(x) - x.roll(1, -1)).square().mean()
    return task + 0.1 * load_balancing_loss(network) + 0.05 * router_z_loss(network)


def make_network(routers: str) -> Network:
    torch.manual_seed(3)
    network = Network(routers).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.5)
    return network


class Module(pl.LightningModule):
    def __init__(self, routers: str) -> None:
        super().__init__()
        self.network, self.losses = make_network(routers), list[float]()

    def training_step(self, x: Tensor, _: int) -> Tensor:
        loss = objective(self.network, x)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def train(fold: str, data: list[Tensor], routers: str) -> tuple[list[float], dict[str, Piece], Any, Tensor]:
    """Rows are dealt to the data ranks in turn; two batches a step.

    Returns:
        Losses, weights, biases, and how many choices of the first layer stayed on their rank and how many left it.
    """
    world = dist.get_world_size()
    place = Fold.parse(fold, world)
    at = place.coordinates(dist.get_rank())
    rank, module, travels = at["dp"], Module(routers), torch.zeros(2, dtype=torch.int64)

    def count(_gate: nn.Module, _inputs: Any, routed: RouterOutput) -> None:
        leaves_TK = routed.expert_TK // (8 // place.ep) != at["ep"]
        travels.add_(torch.stack([(~leaves_TK).sum(), leaves_TK.sum()]))

    module.network.first.gate.register_forward_hook(count)
    trainer = pl.Trainer(
        accelerator="cpu", devices=world, plugins=[PoolEnvironment()], precision="64-true", max_epochs=1,
        strategy=MoEFoldStrategy(fold=fold), accumulate_grad_batches=2, logger=False, use_distributed_sampler=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(BatchList([x[rank :: place.dp] for x in data]), batch_size=None))
    return module.losses, owned_pieces(module.network), module.network.biases(), travels


def train_alone(data: list[Tensor], routers: str) -> tuple[list[float], dict[str, Tensor], Any]:
    network = make_network(routers)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    losses = []
    for index, x in enumerate(data):
        loss = objective(network, x)
        losses.append(loss.item())
        (loss / 2).backward()
        if index % 2:
            optimizer.step()
            optimizer.zero_grad()
            update_expert_bias(network)
    return losses, {name: p.detach() for name, p in network.named_parameters()}, network.biases()

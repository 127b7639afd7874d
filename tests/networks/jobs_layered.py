# SPDX-License-Identifier: Apache-2.0
"""A network of a user's own that names its layers, and the training run that one process makes of it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_moefold import Fold, MoEFoldStrategy
from lightning_moefold.balance.fast import ExpertCopies
from lightning_moefold.dispatch import DispatchConfig
from lightning_moefold.mesh import FoldedMesh
from lightning_moefold.modules import (
    Attention,
    DecoderLayer,
    GatedMLP,
    MoELayer,
    RouterOptions,
    load_balancing_loss,
)
from lightning_moefold.parallel import Settings, local_part, parallelize
from lightning_moefold.parallel.network.runner import runner_of
from lightning_moefold.testing import PoolEnvironment
from lightning_moefold.testing.pieces import owned_pieces
from tests.balance.moving import MoveEverything
from tests.exactness.runs import BatchList
from tests.networks.jobs_networks import CLASSES, SIZE, Block, Run, alone, train_by_hand
from tests.strategy.jobs_bad_input import told

Batch = dict[str, Tensor]


class Plain(nn.Module):
    """A layer without any block of ours; changes what it is given in place."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Sequential(nn.LayerNorm(SIZE), nn.Linear(SIZE, SIZE), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        change = self.mix(x.clone())
        x *= 0.5
        return x + change


class Layers(nn.Module):
    """Every kind of layer; the ends know positions and whole rows, and may share a weight."""

    pipeline_layers = "body.blocks"

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__()
        dispatch = DispatchConfig(capacity_factor=spec["capacity"]) if "capacity" in spec else None
        router = RouterOptions(norm_topk_prob=False, **spec.get("router", {}))
        causal = DecoderLayer(
            SIZE,
            Attention(SIZE, 4, 2, 4, sliding_window=3),
            MoELayer(SIZE, 8, 3, 8, router=router, keep_routing=True, dispatch=dispatch),
        )
        own = {"router": router} if "router" in spec else {}
        moe = MoELayer(SIZE, 4, 2, 8, shared_ffn_hidden_size=4, keep_routing=True, dispatch=dispatch, **own)
        blocks = [Block(moe), Plain(), causal, Block(GatedMLP(SIZE, 8, "gelu"))][: spec.get("layers", 4)]
        self.lift = nn.Linear(7, SIZE)
        self.position = nn.Parameter(torch.randn(1, 8, SIZE))
        self.body = nn.ModuleDict({"blocks": nn.ModuleList(blocks)})
        self.out = nn.Linear(SIZE, CLASSES)
        self.spec = spec

    def embed(self, batch: Batch) -> Tensor:
        pixels = batch["pixels"].to(self.spec.get("dtype", torch.float64))
        hidden = self.lift(pixels) + self.position[:, : pixels.shape[1]]
        return hidden.transpose(1, 2).contiguous().transpose(1, 2)  # as convolutions leave it

    def head(self, hidden: Tensor, batch: Batch) -> Any:
        if self.spec.get("tied"):
            hidden = hidden + F.linear(hidden, self.lift.weight.T) @ self.lift.weight.T
        logits = self.out(hidden)
        if not self.training:
            return logits.mean(1)
        if self.spec["head"] == "mean":
            return F.cross_entropy(logits.mean(1), batch["classes"])
        losses = F.cross_entropy(logits.flatten(0, 1), batch["tokens"].flatten(), reduction="none", ignore_index=-100)
        return losses.sum(), (batch["tokens"] != -100).sum()

    def forward(self, batch: Batch) -> Any:
        x = self.embed(batch)
        for block in self.body["blocks"]:
            x = block(x)
        return self.head(x, batch)


FROZEN = {
    "none": (), "ends": ("lift.", "position", "out."), "first": ("lift.", "position", "body.blocks.0.", "body.blocks.1."),
    "last": ("out.", "body.blocks.2.", "body.blocks.3."), "experts": ("body.blocks.0.mixer.experts",),
}  # fmt: skip


class Module(pl.LightningModule):
    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__()
        self.spec, self.run, self.network = spec, Run(), None
        self.outputs: list[Tensor] = []
        self.held: list[str] = []

    def configure_model(self) -> None:
        if self.network is None:
            torch.manual_seed(7 + self.spec.get("rank", 0))
            self.network = Layers(self.spec)
            for name, parameter in self.network.named_parameters():
                parameter.requires_grad_(not name.startswith(FROZEN[self.spec.get("frozen", "none")] or ("-",)))

    def training_step(self, batch: Batch, _: int) -> Tensor:
        if self.spec.get("peek"):
            self.network.eval()
            with torch.inference_mode():
                self.network(batch)
            self.network.train()
        loss = self.network(batch)
        self.run.losses.append(loss.item())
        if self.spec.get("calls"):
            loss = loss + 0.5 * self.network(reversed_(batch))
        if self.spec.get("balance"):
            balance = load_balancing_loss(self.network)
            self.run.balance.append(balance.item())
            loss = loss + 0.3 * balance
        return loss

    def validation_step(self, batch: Batch, _: int) -> None:
        self.outputs.append(self.network(batch))

    def predict_step(self, batch: Batch, _: int) -> Tensor:
        return self.network(batch)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.run.grads.append(owned_pieces(self.network, "grad"))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        learning = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(learning, lr=self.spec.get("lr", 1e-2), weight_decay=0.1)


def reversed_(batch: Batch) -> Batch:
    return {**batch, "pixels": batch["pixels"].flip(1)}


def make_data(steps: int, ranks: int, rows: int = 2) -> list[list[Batch]]:
    """``[step][data rank]``; another number of rows, at least ``rows``, and another length on every rank."""
    draw = torch.Generator().manual_seed(11)
    data = []
    for step in range(steps):
        batches = []
        for rank in range(ranks):
            count, length = rows + (rank + step) % 3, 4 + (rank + step) % 3
            tokens = torch.randint(CLASSES, (count, length), generator=draw)
            tokens = tokens.masked_fill(torch.rand(tokens.shape, generator=draw) < 0.2 * (rank + 1), -100)
            batches.append({
                "pixels": torch.randn(count, length, 7, generator=draw, dtype=torch.float64),
                "classes": torch.randint(CLASSES, (count,), generator=draw), "tokens": tokens,
            })  # fmt: skip
        data.append(batches)
    return data


def train(fold: str, data: list[list[Batch]], spec: dict[str, Any]) -> tuple[Run, list[Tensor], list[str]]:
    """Under a fold, in a rank of the pool; validates afterwards."""
    module = Module({**spec, "rank": dist.get_rank()})  # every rank draws other weights: those of rank 0 count
    trainer, loader = make_trainer(fold, data, spec)
    trainer.fit(module, loader)
    run = module.run
    run.weights = owned_pieces(module.network)
    run.loads = {n: m.load_E.clone() for n, m in module.network.named_modules() if isinstance(m, MoELayer)}
    if spec.get("validate", True):
        trainer.validate(module, loader, verbose=False)
        module.outputs += trainer.predict(module, loader) if spec.get("predict") else []
    return run, module.outputs, [n for n, _ in module.network.named_parameters()]


def changed(fold: str, data: list[list[Batch]], first: dict[str, Any], second: dict[str, Any]) -> list[Any]:
    """A network that has been trained (without learning) under ``first``, then a fresh one, both under ``second``."""
    found, used = [], Module({"head": "pair", "balance": True, "lr": 0.0})
    trainer, loader = make_trainer(fold, data, first)
    trainer.fit(used, loader)
    for module in (used, Module({"head": "pair", "balance": True})):
        module.spec, module.run = {**module.spec, "lr": 1e-2}, Run()
        trainer, loader = make_trainer(fold, data, second)
        trainer.fit(module, loader)
        trainer.validate(module, loader, verbose=False)
        runner = runner_of(module.network)
        cuts = [block.rows for block in runner.network.blocks()]
        seen: dict[str, Any] = {"settings": runner.settings, "exchanges": [cut and cut.exchange for cut in cuts]}
        if runner.pipeline is not None:
            schedule = runner.pipeline.runner._schedule
            seen |= {"schedule": type(schedule).__name__, "microbatches": schedule._n_microbatches}
        weights = {name: local_part(parameter).clone() for name, parameter in module.network.named_parameters()}
        found.append((seen, module.run.losses, module.run.balance, weights, module.outputs))
    return found


def stop_and_resume(folds: list[str], data: list[list[Batch]], path: str) -> Run:
    """One step under each fold, from the checkpoint of the one before."""
    for index, fold in enumerate(folds):
        module = Module({"head": "pair", "rank": dist.get_rank()})
        few = {"microbatches": 4 if fold.startswith("pp4") else 2}
        trainer, loader = make_trainer(fold, [data[index]], few, epochs=index + 1)
        trainer.fit(module, loader, ckpt_path=None if index == 0 else path)
        trainer.save_checkpoint(path)
    module.run.weights = owned_pieces(module.network)
    return module.run


def make_trainer(
    fold: str, data: list[list[Batch]], spec: dict[str, Any], epochs: int = 1, **more: Any
) -> tuple[pl.Trainer, DataLoader]:
    world = dist.get_world_size()
    place = Fold.parse(fold, world).coordinates(dist.get_rank())
    strategy = MoEFoldStrategy(
        fold=fold, data_parallel_sharding=spec.get("sharding", "optimizer"), num_microbatches=spec.get("microbatches", 2),
        pipeline_schedule=spec.get("schedule", "1f1b"), num_stages_per_rank=spec.get("chunks", 1),
        recompute=spec.get("recompute"), context_parallel_exchange=spec.get("exchange", "auto"),
    )  # fmt: skip
    trainer = pl.Trainer(
        accelerator="cpu", devices=world, plugins=[PoolEnvironment()], precision=spec.get("precision", "64-true"),
        max_epochs=epochs, strategy=strategy, accumulate_grad_batches=spec.get("accumulate", 1), gradient_clip_val=0.5,
        use_distributed_sampler=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        logger=False, callbacks=[MoveEverything()] if spec.get("moves") else [], **more,
    )  # fmt: skip
    return trainer, DataLoader(BatchList([step[place["dp"]] for step in data]), batch_size=None)


def train_alone(data: list[list[Batch]], spec: dict[str, Any]) -> tuple[Run, list[list[Tensor]]]:
    """The oracle: plain PyTorch, one process, the data of all ranks."""
    module = alone(spec, Module)
    network = module.network

    def losses(step: list[Batch]) -> tuple[Tensor, list[float], list[Any]]:
        loss, values, routed = _losses(network, step, spec)
        if spec.get("calls"):
            again, _, routed = _losses(network, [reversed_(batch) for batch in step], spec)
            loss = loss + 0.5 * again
        return loss, values, routed

    run = train_by_hand(module, data, spec, losses)
    network.eval()
    with torch.no_grad():
        return run, [[network(batch) for batch in step] for step in data]


def _losses(network: nn.Module, step: list[Batch], spec: dict[str, Any]) -> tuple[Tensor, list[float], list[Any]]:
    found, routed = [], []
    for batch in step:
        found.append(network(batch))
        routed.append([m.routing for m in network.modules() if isinstance(m, MoELayer)])
    if spec["head"] == "mean":
        return torch.stack(found).mean(), [part.item() for part in found], routed
    loss = sum(total for total, _ in found) / sum(weight for _, weight in found)
    return loss, [loss.item()] * len(step), routed


class _Odd(Module):
    """A module that does one thing wrong."""

    def __init__(self, wrong: str) -> None:
        super().__init__({"head": "pair"})
        self.wrong = wrong

    def configure_model(self) -> None:
        super().configure_model()
        network, wrong = self.network, self.wrong
        blocks = network.body["blocks"]
        if wrong == "block in head":
            network.pool = GatedMLP(SIZE, 8)
        elif wrong == "shared layer":
            blocks[3] = blocks[1]
        elif wrong == "tied to an end":
            blocks[1].mix[1].bias = network.lift.bias
        elif wrong == "batch norm":
            network.norm = nn.BatchNorm1d(4)
        elif wrong == "no list":
            type(network).pipeline_layers = "bodies"
        elif wrong == "second name":
            self.last = blocks[3]
        elif wrong == "mean over positions":
            blocks[1].mix[2] = Centred()
        elif wrong == "length":
            blocks[1] = Shorter()


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(1, keepdim=True)


class Shorter(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, 1:]


class _Fails(Layers):
    """Whose code fails on one data rank."""

    def embed(self, batch: Batch) -> Tensor:
        if batch.get("fails") == "embed":
            raise ZeroDivisionError
        return super().embed(batch)

    def head(self, hidden: Tensor, batch: Batch) -> Any:
        if batch.get("fails") == "head":
            raise ZeroDivisionError
        result = super().head(hidden, batch)
        return {None: result, "rows": hidden.mean(1), "kind": [1, 2, 3]}.get(batch.get("gives"), result)


def refused(fold: str, wrongs: list[str]) -> dict[str, str]:
    """What a fit says of each."""
    said = {}
    for wrong in wrongs:
        try:
            trainer, loader = make_trainer(fold, make_data(1, 1), {}, max_steps=1)
            said[wrong] = told(lambda t=trainer, w=wrong, d=loader: t.fit(_Odd(w), d))
        finally:
            Layers.pipeline_layers = "body.blocks"
    return said


def counted(fold: str) -> tuple[list[Any], list[Any], list[Tensor], list[Tensor]]:
    """Counters of the layers of this rank, and their choices, in a call and in that of its load-balancing loss."""
    mesh = FoldedMesh(Fold.parse(fold, dist.get_world_size()), "cpu")
    router = {"bias_update_rate": 0.1, "input_jitter": 0.3}
    network = Layers({"head": "pair", "dtype": torch.float32, "router": router})
    settings = Settings(num_microbatches=2, dispatch=DispatchConfig(copies=ExpertCopies("greedy")))
    parallelize(network, mesh, settings, torch.device("cpu"))
    layers = [layer for layer in network.modules() if isinstance(layer, MoELayer)]
    chosen: list[Tensor] = []
    for layer in layers:
        layer.gate.register_forward_hook(lambda gate, given, routed: chosen.append(routed.expert_TK))

    def counters() -> list[Any]:
        return [
            [layer.load_E.tolist(), layer.gate.counts_E.tolist(), int(layer.gate.call), vars(layer.copies).copy()]
            for layer in layers
        ]

    found = []
    for run in (
        lambda: network(make_data(1, mesh.fold.dp, 4)[0][mesh.place["dp"]]),
        lambda: load_balancing_loss(network),
    ):
        run().backward()
        found += [counters(), chosen.copy()]
        chosen.clear()
    return found[0], found[2], found[1], found[3]


def calls(fold: str) -> dict[str, Any]:
    """Errors in single calls, after each of which the network goes on."""
    mesh = FoldedMesh(Fold.parse(fold, dist.get_world_size()), "cpu")
    network = _Fails({"head": "pair", "dtype": torch.float32})
    parallelize(network, mesh, Settings(num_microbatches=2), torch.device("cpu"))
    last = dist.get_rank() == dist.get_world_size() - 1
    batch = make_data(1, mesh.fold.dp, 4)[0][mesh.place["dp"]]
    wrong = mesh.place["dp"] == mesh.fold.dp - 1  # on the last data rank only
    few = {name: t[: 1 if wrong else 2] for name, t in batch.items()}
    said = {
        "few rows": told(lambda: network(few)),
        "other batch": told(lambda: network({**batch, "pixels": batch["pixels"] + last})),
        "embed": told(lambda: network({**batch, **({"fails": "embed"} if wrong else {})})),
        "head": told(lambda: network({**batch, **({"fails": "head"} if wrong else {})})),
        "output in training": told(lambda: network({**batch, "gives": "rows"})),
        "no result": told(lambda: network({**batch, "gives": "kind"})),
        "no tensor": told(lambda: network({})),
        "good again": told(lambda: network(batch).backward()),
    }
    with torch.no_grad():
        said["few rows in evaluation"] = told(lambda: network(few))
    said["placeholder"] = told(lambda: [layer(torch.zeros(1, 4, SIZE)) for layer in network.body["blocks"]])
    return said

# SPDX-License-Identifier: Apache-2.0
"""Networks of a user's own with blocks in them, and the training run that one process makes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_moefold import Fold, MoEFoldStrategy
from lightning_moefold.modules import (
    Attention,
    DecoderLayer,
    GatedMLP,
    MoELayer,
    RMSNorm,
    RouterOptions,
    load_balancing_loss,
)
from lightning_moefold.testing import PoolEnvironment
from lightning_moefold.testing.pieces import owned_pieces
from tests.balance.moving import MoveEverything
from tests.exactness.runs import BatchList

SIZE, CLASSES = 12, 5


class Block(nn.Module):
    """A user's own block: their norm and residuals around ours."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(SIZE), RMSNorm(SIZE)
        self.attention = Attention(SIZE, 4, 2, 4, causal=False, rope_theta=50.0, qkv_bias=True, output_bias=True)
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mixer(self.norm2(x))


class Patches(nn.Module):
    """A vision transformer in small: every kind of block, alone and inside others, and parameters of its own."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__()
        expert = (lambda: nn.Sequential(nn.Linear(SIZE, 6), nn.GELU(), nn.Linear(6, SIZE))) if spec["expert"] else None
        width = None if expert else 8
        moe = MoELayer(SIZE, 4, 2, width, expert=expert, shared_ffn_hidden_size=4, keep_routing=True)
        decoder = DecoderLayer(
            SIZE,
            Attention(SIZE, 4, 4, rope_theta=None),
            MoELayer(SIZE, 8, 3, 8, router=RouterOptions(norm_topk_prob=False), keep_routing=True),
        )
        self.embed = nn.Linear(7, SIZE)
        self.position = nn.Parameter(torch.randn(1, 5, SIZE))
        self.blocks = nn.Sequential(Block(GatedMLP(SIZE, 8, "gelu")), Block(moe), decoder)
        self.again = self.blocks[1] if spec.get("twice") else nn.Identity()
        self.head = nn.Linear(SIZE, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.blocks(self.embed(pixels) + self.position[:, : pixels.shape[1]])
        return self.head(self.again(x).mean(1))


@dataclass
class Run:
    """What a rank, or the one process, saw."""

    losses: list[float] = field(default_factory=list)
    balance: list[float] = field(default_factory=list)
    grads: list[dict[str, Any]] = field(default_factory=list)
    weights: dict[str, Any] = field(default_factory=dict)
    loads: dict[str, Tensor] = field(default_factory=dict)


class Classifier(pl.LightningModule):
    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__()
        self.spec, self.run, self.network = spec, Run(), None

    def configure_model(self) -> None:
        if self.network is None:
            torch.manual_seed(7 + self.spec.get("rank", 0))
            self.network = Patches(self.spec)
            if self.spec.get("frozen"):
                self.network.blocks[2].mlp.experts.requires_grad_(False)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        loss = F.cross_entropy(self.network(batch["pixels"].to(self.dtype)), batch["classes"])
        self.run.losses.append(loss.item())
        if self.spec.get("balance"):
            balance = load_balancing_loss(self.network)
            self.run.balance.append(balance.item())
            loss = loss + 0.3 * balance
        return loss

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        return self.loss(batch)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.run.grads.append(owned_pieces(self.network, "grad"))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)


def make_data(steps: int, ranks: int) -> list[list[dict[str, Tensor]]]:
    """``[step][data rank]``; another number of rows and another length on every rank."""
    draw = torch.Generator().manual_seed(11)
    return [
        [
            {
                "pixels": torch.randn(2 + (rank + step) % 3, 3 + rank % 3, 7, generator=draw, dtype=torch.float64),
                "classes": torch.randint(CLASSES, (2 + (rank + step) % 3,), generator=draw),
            }
            for rank in range(ranks)
        ]
        for step in range(steps)
    ]


def train(fold: str, data: list[list[dict[str, Tensor]]], spec: dict[str, Any]) -> Run:
    """Under a fold, in a rank of the pool."""
    # Every rank draws other weights: those of rank 0 count.
    module = Classifier({**spec, "rank": dist.get_rank()})
    _fit(module, fold, data, spec)
    module.run.weights = owned_pieces(module.network)
    module.run.loads = {n: m.load_E for n, m in module.network.named_modules() if isinstance(m, MoELayer)}
    return module.run


class Pixels(Dataset[dict[str, Tensor]]):
    """Pictures by number."""

    def __init__(self, count: int) -> None:
        draw = torch.Generator().manual_seed(3)
        self.pixels = torch.randn(count, 5, 7, generator=draw, dtype=torch.float64)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"index": torch.tensor(index), "pixels": self.pixels[index]}


class Predictor(Classifier):
    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> tuple[Tensor, Tensor]:
        if self.spec.get("fails") in batch["index"].tolist():
            raise OSError("the disk is full")
        return batch["index"], self.network(batch["pixels"].to(self.dtype))


def predict(runs: list[tuple[str, int, dict[str, Any]]]) -> list[dict[int, Tensor] | str]:
    """The logits of each picture that this rank has predicted, or why it stopped."""
    outcomes: list[dict[int, Tensor] | str] = []
    for fold, count, spec in runs:
        module, trainer = Predictor({"expert": False, "rank": dist.get_rank(), **spec}), make_trainer(fold, spec)
        try:
            batches = trainer.predict(module, DataLoader(Pixels(count), batch_size=2)) or []
        except Exception as error:
            outcomes.append(f"{type(error).__name__}: {error}")
            dist.barrier()
            continue
        assert not any(m.unequal or m.load_E.any() for m in module.modules() if isinstance(m, MoELayer))
        outcomes.append({int(i): x for index, logits in batches for i, x in zip(index, logits, strict=True)})
    return outcomes


def stop_and_resume(folds: list[str], data: list[list[dict[str, Tensor]]], path: str) -> Run:
    """One step under each fold, from the checkpoint of the one before."""
    for index, fold in enumerate(folds):
        module = Classifier({"expert": False, "rank": dist.get_rank()})
        start = None if index == 0 else path
        trainer = _fit(module, fold, [data[index]], {"sharding": "full", "epochs": index + 1}, start)
        trainer.save_checkpoint(path)
    module.run.weights = owned_pieces(module.network)
    return module.run


def _fit(module: Classifier, fold: str, data: Any, spec: dict[str, Any], start: str | None = None) -> pl.Trainer:
    place = Fold.parse(fold, dist.get_world_size()).coordinates(dist.get_rank())
    trainer = make_trainer(fold, spec, use_distributed_sampler=False)
    loader = DataLoader(BatchList([step[place["dp"]] for step in data]), batch_size=None)
    trainer.fit(module, loader, ckpt_path=start)
    return trainer


def make_trainer(fold: str, spec: dict[str, Any], **arguments: Any) -> pl.Trainer:
    world = dist.get_world_size()
    return pl.Trainer(
        accelerator="cpu", devices=world, plugins=[PoolEnvironment()],
        precision=spec.get("precision", "64-true"), max_epochs=spec.get("epochs", 1),
        strategy=MoEFoldStrategy(
            fold=fold, data_parallel_sharding=spec.get("sharding", "optimizer"), **spec.get("dispatch", {})
        ),
        accumulate_grad_batches=spec.get("accumulate", 1), gradient_clip_val=0.5,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, logger=False,
        callbacks=[MoveEverything()] if spec.get("moves") else [], **arguments,
    )  # fmt: skip


def predict_alone(count: int, spec: dict[str, Any]) -> Tensor:
    """Logits of all pictures in one process, ``[count, classes]``."""
    module = alone({"expert": False, **spec})
    with torch.no_grad():
        return module.network(Pixels(count).pixels)


def alone(spec: dict[str, Any], kind: Any = Classifier) -> Any:
    """With the weights of rank 0, in float64."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        module = kind(spec)
        module.configure_model()
    finally:
        torch.set_default_dtype(default)
    return module.double()


def train_alone(data: list[list[dict[str, Tensor]]], spec: dict[str, Any]) -> Run:
    """The oracle: plain PyTorch, one process; the losses of the data ranks are averaged."""
    module = alone(spec)

    def losses(step: list[dict[str, Tensor]]) -> tuple[Tensor, list[float], list[Any]]:
        logits, routed = [], []
        for batch in step:
            logits.append(module.network(batch["pixels"]))
            routed.append([m.routing for m in module.network.modules() if isinstance(m, MoELayer)])
        parts = [F.cross_entropy(x, batch["classes"]) for x, batch in zip(logits, step, strict=True)]
        return torch.stack(parts).mean(), [part.item() for part in parts], routed

    return train_by_hand(module, data, spec, losses)


def train_by_hand(
    module: Any, data: list[Any], spec: dict[str, Any], losses: Callable[[Any], tuple[Tensor, list[float], list[Any]]]
) -> Run:
    """Steps of ``module.network``; ``losses`` gives the loss of a step, that of each data rank, and how each was routed."""
    network = module.network
    optimizer, accumulate = module.configure_optimizers(), spec.get("accumulate", 1)
    run = Run()
    for index, step in enumerate(data):
        loss, values, routed = losses(step)
        run.losses.append(values)
        if spec.get("balance"):
            balance = _naive_balance(list(zip(*routed, strict=True)))
            run.balance.append(balance.item())
            loss = loss + 0.3 * balance
        (loss / accumulate).backward()
        if (index + 1) % accumulate == 0:
            torch.nn.utils.clip_grad_norm_(network.parameters(), 0.5)
            run.grads.append({n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None})
            optimizer.step()
            optimizer.zero_grad()
    run.weights = {n: p.detach().clone() for n, p in network.named_parameters()}
    run.loads = {n: m.load_E.clone() for n, m in network.named_modules() if isinstance(m, MoELayer)}
    return run


def _naive_balance(layers: list[Any]) -> Tensor:
    """``E * sum f_e P_e`` per layer, over the tokens of all data ranks."""
    losses = []
    for parts in layers:
        counts = sum(r.table_SE[0] for r in parts)
        probability = sum(r.table_SE[1] for r in parts)
        tokens = counts.sum() / parts[0].top_k
        losses.append(len(counts) * (counts / tokens * probability / tokens).sum())
    return torch.stack(losses).mean()

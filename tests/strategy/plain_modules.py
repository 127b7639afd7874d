# SPDX-License-Identifier: Apache-2.0
"""Jobs for the ranks of the pool: LightningModules without MoE layers, under this strategy or under DDP."""

from __future__ import annotations

import functools
import os
import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
import torchmetrics
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.core.hooks import CheckpointHooks, DataHooks, ModelHooks
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_moefold import MoEFoldStrategy
from lightning_moefold.testing import PoolEnvironment

#: Hooks that strategies may call or not, as they make models in their own way.
_NOT_COMPARED = {"configure_model", "configure_sharded_model", "setup", "teardown"}


class Samples(Dataset):
    def __init__(self, count: int = 22) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(count, 6, generator=generator)
        self.y = (self.x.sum(1) > 0).long() + (self.x[:, 0] > 1).long()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"index": torch.tensor(index), "x": self.x[index], "y": self.y[index]}


class Classifier(pl.LightningModule):
    """Weights differ between ranks until somebody makes them alike, and one layer is used on some batches only."""

    def __init__(self, branches: bool = False) -> None:
        super().__init__()
        torch.manual_seed(100 + int(dist.get_rank()))
        self.save_hyperparameters()
        self.branches = branches
        self.body = nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh())
        self.head = nn.Linear(8, 3)
        self.rare = nn.Linear(8, 3)
        self.frozen = nn.Linear(8, 3).requires_grad_(False)
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=3)
        self.seen: list[list[int]] = []
        self.grads: list[dict[str, torch.Tensor | None]] = []
        self.logged: list[dict[str, float]] = []
        self.start: dict[str, torch.Tensor] = {}

    def on_train_start(self) -> None:
        self.start = {name: value.clone() for name, value in self.state_dict().items()}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.body(x)
        logits = self.head(hidden) + self.frozen(hidden)
        if self.branches and bool((x[:, 0] > 0.9).any()):  # on some ranks, in some batches
            logits = logits + self.rare(hidden)
        return logits

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        self.seen.append(batch["index"].tolist())
        loss = nn.functional.cross_entropy(self(batch["x"]), batch["y"])
        self.log("train/loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.log("train/rows", float(len(batch["y"])), reduce_fx="sum", on_epoch=True, on_step=False, sync_dist=True)
        return loss

    def validation_step(self, batch: dict[str, torch.Tensor], _: int) -> None:
        logits = self(batch["x"])
        self.accuracy(logits, batch["y"])
        self.log("val/accuracy", self.accuracy)
        self.log("val/loss", nn.functional.cross_entropy(logits, batch["y"]), sync_dist=True, prog_bar=True)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.grads.append({n: None if p.grad is None else p.grad.clone() for n, p in self.named_parameters()})

    def on_train_epoch_end(self) -> None:
        self.logged.append({k: v.item() for k, v in self.trainer.callback_metrics.items()})

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(
            [p for p in self.parameters() if p.requires_grad], lr=0.1, momentum=0.9, weight_decay=0.01
        )
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)}


class CallbackRecorder(Callback):
    def __init__(self, calls: list[str]) -> None:
        for name in dir(Callback):
            if name.startswith(("on_", "state_", "load_")) and name not in (
                "state_key",
                "state_dict",
                "load_state_dict",
            ):
                setattr(self, name, functools.partial(self._record, calls, name))

    @staticmethod
    def _record(calls: list[str], name: str, *args: Any, **kwargs: Any) -> None:
        calls.append(f"callback.{name}")


def record_hooks(module: pl.LightningModule) -> list[str]:
    """Records the order in which Lightning calls the module's hooks."""
    calls: list[str] = []
    names = {n for kind in (ModelHooks, DataHooks, CheckpointHooks) for n in vars(kind) if not n.startswith("_")}
    names |= {"training_step", "validation_step", "optimizer_step", "optimizer_zero_grad", "backward", "configure_optimizers",
              "configure_gradient_clipping", "clip_gradients", "lr_scheduler_step", "configure_callbacks"}  # fmt: skip
    for name in sorted(names - _NOT_COMPARED):
        hook = getattr(module, name)

        def call(*args: Any, _name: str = name, _hook: Any = hook, **kwargs: Any) -> Any:
            calls.append(_name)
            return _hook(*args, **kwargs)

        setattr(module, name, functools.update_wrapper(call, hook))  # is_overridden() looks through the wrapper
    return calls


def trainer(strategy: Any, **arguments: Any) -> pl.Trainer:
    """A quiet Trainer for a rank of the pool."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu", "devices": dist.get_world_size(), "plugins": [PoolEnvironment()], "logger": False,
        "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    return pl.Trainer(strategy=strategy, **{**defaults, **arguments})


def strategy(fold: str | None) -> Any:
    """This strategy under a fold, or DDP for None."""
    return (
        DDPStrategy(process_group_backend="gloo", find_unused_parameters=True)
        if fold is None
        else MoEFoldStrategy(fold=fold)
    )


def fit(fold: str | None, branches: bool, arguments: dict[str, Any], folder: str | None = None) -> dict[str, Any]:
    """Fits a classifier and tells everything about it."""
    module = Classifier(branches)
    calls = record_hooks(module)
    callbacks: list[Callback] = [CallbackRecorder(calls)]
    if folder is not None:
        callbacks.append(ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1))
    run = trainer(
        strategy(fold), precision="64-true", max_epochs=2, callbacks=callbacks, log_every_n_steps=1,
        enable_checkpointing=folder is not None, **arguments,
    )  # fmt: skip
    run.fit(module, DataLoader(Samples(), 4, shuffle=True), DataLoader(Samples(10), 4))
    return {
        "calls": calls, "seen": module.seen, "grads": module.grads, "logged": module.logged, "start": module.start,
        "weights": dict(module.state_dict()), "step": run.global_step, "epoch": run.current_epoch,
        "batches": run.num_training_batches,
    }  # fmt: skip


def fit_both(fold: str, cases: list[tuple[bool, dict[str, Any]]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Under DDP and under this strategy in the same ranks."""
    return [(fit(None, *case), fit(fold, *case)) for case in cases]


def fit_cases(fold: str | None, cases: list[tuple[bool, dict[str, Any]]]) -> list[dict[str, Any]]:
    return [fit(fold, *case) for case in cases]


class Draws(Dataset):
    """Samples that are nothing but what a worker draws."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(index), float(torch.rand(())), random.random(), float(np.random.rand())])


class Drawing(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))
        self.dropout = nn.Dropout(0.5)
        self.draws: list[torch.Tensor] = []

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        self.draws.append(torch.cat([batch.flatten(), self.dropout(torch.ones(16))]))
        return (self.weight * batch).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def draw(fold: str, workers: int, seed: bool) -> tuple[int, torch.Tensor]:
    """What augmentation and dropout draw on this rank; without a seed every rank starts elsewhere."""
    if seed:
        pl.seed_everything(7, workers=True, verbose=False)
    else:
        os.environ.pop("PL_GLOBAL_SEED", None)  # an earlier test of the session may have left one
        for function in (torch.manual_seed, random.seed, np.random.seed):
            function(1000 + dist.get_rank())
    module, chosen = Drawing(), MoEFoldStrategy(fold=fold)
    trainer(chosen, max_epochs=1).fit(module, DataLoader(Draws(), 2, num_workers=workers))
    return chosen.dp_rank, torch.stack(module.draws)


class ByHand(pl.LightningModule):
    """Manual optimization: two backward passes into the same gradients, and two optimizers."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(100 + dist.get_rank())
        self.first, self.second = nn.Linear(6, 4), nn.Linear(4, 3)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        for power in (1, 2):
            logits = self.second(self.first(batch["x"]).tanh()) ** power
            self.manual_backward(nn.functional.cross_entropy(logits, batch["y"]))
        for optimizer in optimizers:
            self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.first, self.second)]


def by_hand(fold: str) -> list[dict[str, torch.Tensor]]:
    """Under DDP, and under this strategy."""
    weights = []
    for chosen in (None, fold):
        module = ByHand()
        trainer(strategy(chosen), precision="64-true", max_epochs=1).fit(module, DataLoader(Samples(), 4))
        weights.append(dict(module.state_dict()))
    return weights


def resume_plain(fold: str | None, path: str, epochs: int) -> dict[str, torch.Tensor]:
    """Goes on from a checkpoint."""
    module = Classifier()
    run = trainer(strategy(fold), precision="64-true", max_epochs=epochs, gradient_clip_val=0.5)
    run.fit(module, DataLoader(Samples(), 4, shuffle=True), ckpt_path=path)
    return dict(module.state_dict())


def contents(path: str) -> dict[str, Any]:
    return torch.load(Path(path), weights_only=True)

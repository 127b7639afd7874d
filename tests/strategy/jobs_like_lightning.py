# SPDX-License-Identifier: Apache-2.0
"""Jobs for the ranks of the pool: what Lightning offers around a training, under this strategy and under its own."""

from __future__ import annotations

import copy
import io
import os
import pickle
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_moefold import MoECausalLM
from tests.strategy.plain_modules import record_hooks, strategy, trainer

#: ``None`` for DDP, ``"auto"`` for the strategy of one device, otherwise a fold of ours.
Which = str | None


class Rows(Dataset):
    """Rows of two kinds of module: numbers for a plain one, tokens for a language model."""

    def __init__(self, tokens: bool) -> None:
        generator = torch.Generator().manual_seed(5)
        self.rows = (
            torch.randint(96, (16, 6), generator=generator) if tokens else torch.randn(16, 6, generator=generator)
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        return self.rows[index]


class Learner(pl.LightningModule):
    """A backbone and a head; with ``path`` the backbone is a language model.

    With ``dealt`` the ranks share the batches of one process; otherwise Lightning deals them.
    """

    def __init__(self, path: str | None = None, lr: float = 0.05, batch_size: int = 2, dealt: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.dealt = dealt
        self.path, self.lr, self.batch_size = path, lr, batch_size
        self.losses: list[float] = []
        self.head = nn.Linear(8, 1)
        self.backbone: nn.Module
        if path is None:
            self.backbone = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
        else:
            self.backbone = MoECausalLM.from_pretrained(path)

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        if self.path is None:
            loss = (self.head(self.backbone(batch)) - 1).square().mean()
        else:
            loss = self.backbone(input_ids=batch, labels=batch).loss + self.head.weight.square().sum()
        self.losses.append(loss.item())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr, momentum=0.9)

    def train_dataloader(self) -> DataLoader:
        rows = Rows(self.path is not None)
        if not self.dealt:
            return DataLoader(rows, self.batch_size)
        rank, world = dist.get_rank(), dist.get_world_size()
        return DataLoader(Subset(rows, range(rank, len(rows), world)), self.batch_size // world)

    def weights(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.state_dict().items()}


class Unfreezing(lightning_callbacks.BaseFinetuning):
    def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: pl.LightningModule, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer)


class Failing(lightning_callbacks.Callback):
    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            raise KeyError("a failure of the user's")


def _pruning() -> lightning_callbacks.Callback:
    return lightning_callbacks.ModelPruning("l1_unstructured", amount=0.5, parameter_names=["weight"])


#: Callbacks that take hold of the module, and what they are made by.
CALLBACKS: dict[str, Callable[[], lightning_callbacks.Callback]] = {
    "averaging": lambda: lightning_callbacks.StochasticWeightAveraging(1e-2, swa_epoch_start=1),
    "moving average": lightning_callbacks.EMAWeightAveraging,
    "unfreezing": Unfreezing,
    "pruning": _pruning,
    "rate finder": lambda: lightning_callbacks.LearningRateFinder(num_training_steps=8),
    "batch finder": lambda: lightning_callbacks.BatchSizeFinder(max_trials=2, steps_per_trial=1),
}


def _strategy(which: Which) -> Any:
    return "auto" if which == "auto" else strategy(which)


def make(which: Which, folder: str, callbacks: Any = (), **arguments: Any) -> pl.Trainer:
    defaults = {"max_epochs": 3, "default_root_dir": folder, "use_distributed_sampler": dist.get_world_size() > 1}
    if which == "auto":
        defaults["plugins"] = []  # one device needs no environment
    saves = any(isinstance(c, lightning_callbacks.Checkpoint) for c in callbacks)
    return trainer(_strategy(which), callbacks=list(callbacks), enable_checkpointing=saves, **{**defaults, **arguments})


def with_callback(which: Which, name: str, path: str | None, folder: str) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and weights of a training with one of :data:`CALLBACKS`."""
    module = Learner(path, batch_size=4, dealt=True)
    precision = "32-true" if name == "pruning" else "64-true"  # its masks are float32
    make(which, folder, [CALLBACKS[name]()], precision=precision, use_distributed_sampler=False).fit(module)
    return module.losses, module.weights()


def on_exception(which: Which, path: str | None, folder: str) -> list[str]:
    """What has been saved when all ranks failed."""
    target = Path(folder, str(which or "ddp"))
    callbacks = [lightning_callbacks.OnExceptionCheckpoint(target), Failing()]
    with suppress(KeyError):
        make(which, folder, callbacks).fit(Learner(path))
    return sorted(p.name for p in target.iterdir())


def tuned(
    which: Which, path: str | None, folder: str, batch: bool = True
) -> tuple[list[float], float | None, int | None]:
    """Losses and suggestion of the search for a learning rate, and a batch size."""
    module = Learner(path)
    found = Tuner(make(which, folder)).lr_find(module, num_training=12)
    assert found is not None
    size = (
        Tuner(make(which, folder)).scale_batch_size(Learner(path), max_trials=2, steps_per_trial=1) if batch else None
    )
    return found.results["loss"], found.suggestion(), size


def copies(folder: str, path: str | None) -> list[str]:
    """A strategy can be copied while it trains, a Trainer that has run in every way, and the copy can train."""
    midway: list[Any] = []

    def copy_strategy(trainer: pl.Trainer, *_: Any) -> None:
        midway.append(copy.deepcopy(trainer.strategy))

    callback = lightning_callbacks.LambdaCallback(on_train_batch_start=copy_strategy)
    module, run = Learner(path), make("", folder, [callback])
    run.fit(module)
    here = ("_mesh", "_registry", "_even", "_step_ahead", "_predicting", "_background", "_roll_call")
    assert [name for twin in midway for name in here if getattr(twin, name) is not None] == []
    run.callbacks.remove(callback)  # type: ignore[attr-defined]
    again = pickle.loads(pickle.dumps(run))
    kinds = [type(again.strategy).__name__, type(copy.deepcopy(run.strategy)).__name__]
    torch.save(module, io.BytesIO())
    fresh = Learner(path)
    again.fit_loop.max_epochs = 4
    again.fit(fresh)
    return [*kinds, str(len(fresh.losses))]


@dataclass
class Counts:
    """What a callback keeps that is no plain data."""

    batches: int = 0


class Counting(lightning_callbacks.Callback):
    def __init__(self) -> None:
        self.counts = Counts()

    def on_train_batch_end(self, *_: Any) -> None:
        self.counts.batches += 1

    def state_dict(self) -> dict[str, Any]:
        return {"counts": self.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts = state["counts"]


class Configured(Learner):
    """Hooks in which a resumed run does something, in the order in which they come."""

    def configure_model(self) -> None: ...

    def setup(self, stage: str) -> None: ...


def resumed(which: Which, folder: str) -> dict[str, Any]:
    """Hooks of a run that goes on, its callback's state, and where the file is."""
    name = which if which is not None else "ddp"
    saver = lightning_callbacks.ModelCheckpoint(Path(folder, name or "ours"), filename="{epoch}", save_top_k=-1)
    first = make(which, folder, [saver, Counting()], max_epochs=1)
    first.fit(Configured())
    module, counting = Configured(), Counting()
    calls = record_hooks(module)
    for hook in ("configure_model", "setup"):
        _note(module, hook, calls)
    timer = lightning_callbacks.Timer(timedelta(hours=1))
    second = make(which, folder, [counting, timer], max_epochs=2)
    second.fit(module, ckpt_path=saver.best_model_path, weights_only=False)
    return {
        "calls": calls, "batches": counting.counts.batches, "weights": module.weights(),
        "best": os.path.relpath(saver.best_model_path, saver.dirpath), "last": saver.last_model_path,
    }  # fmt: skip


def _note(module: pl.LightningModule, name: str, calls: list[str]) -> None:
    hook = getattr(module, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return hook(*args, **kwargs)

    call.__wrapped__ = hook  # type: ignore[attr-defined]
    setattr(module, name, call)


def saved_early(which: Which, path: str | None, folder: str) -> dict[str, Any] | str:
    """A checkpoint of a module that has been connected and not set up."""
    run = make(which, folder)
    run.strategy.connect(Learner(path))
    target = Path(folder, f"{which}.ckpt")
    try:
        run.save_checkpoint(target)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return torch.load(target, weights_only=True)["state_dict"]

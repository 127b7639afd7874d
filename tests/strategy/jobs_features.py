# SPDX-License-Identifier: Apache-2.0
"""Jobs that use one feature of Lightning each, with an MoE model; what they compute does not depend on the fold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_moefold import MoEFoldStrategy
from lightning_moefold.testing import PoolEnvironment
from tests.strategy import finetune
from tests.strategy.finetune import Finetune, Report, make
from tests.strategy.jobs_bad_input import told


class Clipping(Finetune):
    """Clips in its own way: experts' gradients by value, through Lightning's method."""

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=1e-3, gradient_clip_algorithm="value")
        self.clip_gradients(optimizer, gradient_clip_val=1e-2, gradient_clip_algorithm="norm")


class Unfreezing(Finetune):
    """Attention is trained from the third batch on, the experts until then."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        for name, parameter in self.model.named_parameters():
            if "self_attn" in name or ".experts." in name:
                parameter.requires_grad_(("self_attn" in name) == (batch_idx >= 2))


class TwoLoaders(Finetune):
    """Two validation loaders, and loaders that are made anew each epoch."""

    made = 0

    def train_dataloader(self) -> Any:
        self.made += 1
        return self.steps(2 * finetune.ROWS, self.trainer.current_epoch)

    def val_dataloader(self) -> Any:
        return [self.steps(finetune.ROWS, 1), self.steps(2 * finetune.ROWS, 2)]

    def validation_step(self, batch: dict[str, Tensor], index: int, dataloader_idx: int = 0) -> None:
        loss = self.model(**batch).loss
        self.report.validation.append(loss.item())
        self.log("val/loss", loss)


class Logging(Finetune):
    """Values of this rank's rows, reduced by Lightning over the ranks that read different rows."""

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        rows = float(len(batch["input_ids"]))
        self.log("rows", rows, sync_dist=True, reduce_fx="sum", on_step=False, on_epoch=True)
        tokens = batch["input_ids"].double().mean()
        self.log("tokens", tokens, sync_dist=True, on_step=False, on_epoch=True, batch_size=1)
        gathered = self.all_gather(batch["input_ids"].double().sum())
        assert gathered.numel() == self.trainer.world_size  # of every rank, also those that read the same rows
        return super().training_step(batch, index)


class Tokens(Dataset):
    def __init__(self) -> None:
        self.rows = finetune.rows(4 * finetune.ROWS)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class OwnSampler(Finetune):
    """Deals rows by itself, as ``use_distributed_sampler=False`` asks for."""

    def train_dataloader(self) -> Any:
        strategy = self.trainer.strategy
        rank, size, each = strategy.dp_rank, strategy.dp_size, finetune.ROWS // strategy.dp_size
        order = [r for step in range(4) for r in range(step * finetune.ROWS + rank, (step + 1) * finetune.ROWS, size)]
        return DataLoader(Tokens(), each, sampler=_Fixed(order))


class LightningSampler(Finetune):
    """Leaves dealing to Lightning, in the order of the data: rank r of n reads rows r, r + n, ..."""

    def train_dataloader(self) -> Any:
        return DataLoader(Tokens(), finetune.ROWS // self.trainer.strategy.dp_size)


class _Fixed(Sampler):
    def __init__(self, order: list[int]) -> None:
        self.order = order

    def __iter__(self) -> Any:
        return iter(self.order)

    def __len__(self) -> int:
        return len(self.order)


def _callbacks(folder: str) -> list[Any]:
    seen: list[int] = []
    return [
        lightning_callbacks.LearningRateMonitor("step"),
        lightning_callbacks.DeviceStatsMonitor(),
        lightning_callbacks.LambdaCallback(on_train_batch_end=lambda *_: seen.append(1)),
        lightning_callbacks.Timer("00:01:00:00"),
        lightning_callbacks.ModelSummary(),
    ]


#: What to fit, with which Trainer.
WORKING: dict[str, tuple[type[Finetune], Callable[[str], dict[str, Any]]]] = {
    "GradientAccumulationScheduler": (
        Finetune,
        lambda _: {"max_epochs": 2, "callbacks": [lightning_callbacks.GradientAccumulationScheduler({0: 1, 1: 2})]},
    ),
    "watching callbacks": (
        Finetune,
        lambda f: {
            "max_steps": 2, "callbacks": _callbacks(f), "logger": CSVLogger(f), "log_every_n_steps": 1, "deterministic": True,
            "profiler": "simple", "enable_progress_bar": True,
        },
    ),
    "barebones": (Finetune, lambda _: {"max_steps": 2, "barebones": True}),
    "clipping by value": (
        Finetune, lambda _: {"max_steps": 2, "gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"},
    ),
    "unfreezing": (Unfreezing, lambda _: {"max_steps": 4}),
    "own clipping": (Clipping, lambda _: {"max_steps": 2}),
    "loaders": (TwoLoaders, lambda _: {"max_epochs": 2, "reload_dataloaders_every_n_epochs": 1, "inference_mode": True}),
    "sync_dist": (Logging, lambda _: {"max_epochs": 1}),
    "own sampler": (OwnSampler, lambda _: {"max_epochs": 1, "use_distributed_sampler": False}),
    "Lightning's sampler": (LightningSampler, lambda _: {"max_epochs": 1}),
}  # fmt: skip


def working(path: str, fold: str, folder: str) -> dict[str, Report]:
    reports = {}
    for name, (kind, arguments) in WORKING.items():
        module, run = kind(path), make(fold, arguments(folder))
        if run.barebones:
            module.log = lambda *_, **__: None  # type: ignore[method-assign]
        run.fit(module)
        reports[name] = finetune.finish(module, run)
    return reports


def anomalies(path: str, fold: str) -> str:
    return told(lambda: make(fold, {"max_steps": 1, "detect_anomaly": True}).fit(Finetune(path)))


def weights_only(path: str, fold: str, folder: str) -> list[float]:
    """Weights without the optimizer, evaluated by another Trainer."""
    module, run = Finetune(path), make(fold, {"max_steps": 2})
    run.fit(module)
    target = Path(folder, "weights.ckpt")
    run.save_checkpoint(target, weights_only=True)
    before = run.validate(module)[0]["val/loss"]
    return [before, make(fold, {}).validate(Finetune(path), ckpt_path=str(target))[0]["val/loss"]]


class _IO(TorchCheckpointIO):
    """A user's own."""


class _Finetuning(lightning_callbacks.BaseFinetuning):
    def freeze_before_training(self, pl_module: pl.LightningModule) -> None: ...

    def finetune_function(self, pl_module: pl.LightningModule, epoch: int, optimizer: Any) -> None: ...


class _Backbone(lightning_callbacks.BackboneFinetuning):
    def on_fit_start(self, *_: Any) -> None: ...

    def setup(self, *_: Any) -> None: ...  # asks for a part named backbone


class _EMA(lightning_callbacks.WeightAveraging):
    """A user's own average."""


class _Pruning(lightning_callbacks.ModelPruning):
    pass


def refused(path: str, fold: str, folder: str) -> dict[str, str]:
    """What a Trainer says, by the name that its sentence must hold."""

    def callback(made: Any) -> Callable[[], Any]:
        return lambda: make(fold, {"max_steps": 1, "callbacks": [made], "enable_checkpointing": True}).fit(
            Finetune(path)
        )

    def plugin(made: Any) -> Callable[[], Any]:
        return lambda: make(fold, {"max_steps": 1, "plugins": [PoolEnvironment(), made]}).fit(Finetune(path))

    cases: dict[str, Callable[[], Any]] = {
        "StochasticWeightAveraging": callback(lightning_callbacks.StochasticWeightAveraging(1e-2)),
        "WeightAveraging": callback(lightning_callbacks.WeightAveraging()),
        "_EMA": callback(_EMA()),
        "OnExceptionCheckpoint": callback(lightning_callbacks.OnExceptionCheckpoint(folder)),
        "save_on_exception": callback(lightning_callbacks.ModelCheckpoint(folder, save_on_exception=True)),
        "_Backbone": callback(_Backbone()),
        "_Finetuning": callback(_Finetuning()),
        "_Pruning": callback(_Pruning("l1_unstructured", parameter_names=["weight"])),
        "LearningRateFinder": callback(lightning_callbacks.LearningRateFinder()),
        "batch size finder": callback(lightning_callbacks.BatchSizeFinder()),
        "ThroughputMonitor": callback(lightning_callbacks.ThroughputMonitor(lambda batch: len(batch["input_ids"]))),
        "LearningRateFinder, by Tuner": lambda: Tuner(make(fold, {"max_steps": 1})).lr_find(Finetune(path)),
        "AsyncCheckpointIO": plugin(AsyncCheckpointIO()),
        "_IO": plugin(_IO()),
        "detect_anomaly": lambda: make(fold, {"max_steps": 1, "detect_anomaly": True}).fit(Finetune(path)),
        "sync_batchnorm": plugin(TorchSyncBatchNorm()),
        "multiple optimizers": lambda: make(fold, {"max_steps": 1}).fit(_Two(path)),
        "mps": lambda: pl.Trainer(strategy=MoEFoldStrategy(), accelerator="mps", devices=1),
        "torch_xla": lambda: pl.Trainer(strategy=MoEFoldStrategy(), accelerator="tpu", devices=1),
        "storage_options": lambda: _save_with_options(path, fold, folder),
    }
    return {name: told(case) for name, case in cases.items()}


class _Two(Finetune):
    def configure_optimizers(self) -> Any:
        members = list(self.parameters())
        return [torch.optim.SGD(members[:3], lr=0.1), torch.optim.SGD(members[3:], lr=0.1)]


def _save_with_options(path: str, fold: str, folder: str) -> None:
    run = make(fold, {"max_steps": 1})
    run.fit(Finetune(path))
    run.save_checkpoint(Path(folder, "model.ckpt"), storage_options={"anything": 1})


def compiled(path: str) -> str:
    return told(lambda: make("", {"max_steps": 1}).fit(torch.compile(Finetune(path), backend="eager")))


def own_checkpoint_io(folder: str) -> bool:
    """Without an MoE model the user's own writer is used, as under DDP."""
    module = _Line()
    run = make("", {"max_steps": 1, "plugins": [PoolEnvironment(), _IO()], "precision": "32-true"})
    run.fit(module, DataLoader(torch.ones(4, 2), 1))
    run.save_checkpoint(Path(folder, "plain.ckpt"))
    dist.barrier()
    return Path(folder, "plain.ckpt").is_file() and isinstance(run.strategy.checkpoint_io, _IO)


class _Line(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(2, 1)

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return self.line(batch).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.Muon([self.line.weight], lr=0.1)

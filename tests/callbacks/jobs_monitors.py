# SPDX-License-Identifier: Apache-2.0
"""A monitored training run in one rank of the pool, and a record of what its callbacks did."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from torch.utils.data import DataLoader

from lightning_moefold import Fold, MoEFoldStrategy, comm
from lightning_moefold.callbacks import FoldSummary, LoadBalanceMonitor, MFUMonitor
from lightning_moefold.callbacks.summary import summarize_model
from lightning_moefold.dispatch import ExpertRows
from lightning_moefold.modules.experts import Experts
from lightning_moefold.testing import PoolEnvironment, join_rows
from tests.exactness.runs import BatchList, Case, RankRun

_COLLECTIVES = (
    "all_reduce", "all_gather", comm.ALL_GATHER, "all_gather_object", comm.REDUCE_SCATTER, "broadcast",
    "broadcast_object_list", "all_to_all_single", "barrier",
)  # fmt: skip


class FakeTime:
    """Each training batch takes a second; a validation, a save or an epoch's end takes a thousand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class TimedCase(Case):
    """``Case`` in fake time, with validation."""

    def __init__(self, path: str, spec: dict[str, Any], time: FakeTime) -> None:
        super().__init__(path, RankRun(), spec)
        self.time = time

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        self.time.now += 1.0 + 10.0 * (self.global_step == 0)  # the first step is slow, and left out as warm-up
        return super().training_step(batch, index)

    def validation_step(self, batch: dict[str, torch.Tensor], _: int) -> None:
        self.time.now += 1000.0
        self.log("val/loss", self.model(**batch).loss)

    def on_train_batch_end(self, *_: Any) -> None:
        if "save_by_hand" in self.spec:
            self.trainer.save_checkpoint(f"{self.spec['save_by_hand']}/{self.global_step}.ckpt")

    def on_train_epoch_end(self) -> None:
        self.time.now += 1000.0

    # ModelCheckpoint calls this in the middle of a save, also of weights alone.
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.time.now += 1000.0

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.global_step == self.spec.get("unfreezes_in"):
            self.model.requires_grad_(True)


@dataclass
class Seen:
    """What one rank saw."""

    mfu: list[dict[str, float]] = field(default_factory=list)
    load: list[dict[str, float]] = field(default_factory=list)
    logged: dict[str, float] = field(default_factory=dict)
    history: list[tuple[int, np.ndarray]] = field(default_factory=list)
    collectives: dict[str, int] = field(default_factory=dict)
    expert_rows: list[int] = field(default_factory=list)
    stored: int = 0
    stored_range: tuple[int, int] = (0, 0)
    total: int = 0
    kept: tuple[int, int, int] = (0, 0, 0)
    kept_range: dict[str, tuple[int, int]] = field(default_factory=dict)
    peak: float = 0.0
    left: int = -1


class Watcher(pl.Callback):
    """Collects the figures after each batch at which they changed."""

    def __init__(self, seen: Seen, mfu: MFUMonitor, load: LoadBalanceMonitor) -> None:
        self.seen, self.mfu, self.load = seen, mfu, load

    def on_train_batch_end(self, *_: Any) -> None:
        for monitor, kept in ((self.mfu, self.seen.mfu), (self.load, self.seen.load)):
            if monitor.latest and (not kept or kept[-1] is not monitor.latest):
                kept.append(monitor.latest)


@contextmanager
def counted_collectives(monitors: list[pl.Callback], counts: Counter[str]) -> Iterator[None]:
    """Counts collectives by the monitors' hook in which they are called."""
    inside: list[str] = []

    def count(name: str, stock: Any) -> Any:
        @functools.wraps(stock)
        def call(*args: Any, **kwargs: Any) -> Any:
            if inside:
                counts[f"{inside[-1]}:{name}"] += 1
            return stock(*args, **kwargs)

        return call

    def enter(label: str, stock: Any) -> Any:
        def hook(*args: Any, **kwargs: Any) -> Any:
            inside.append(label)
            try:
                return stock(*args, **kwargs)
            finally:
                inside.pop()

        return hook

    stock = {name: getattr(dist, name) for name in _COLLECTIVES}
    for monitor in monitors:
        for name in dir(pl.Callback):
            if name.startswith("on_"):
                setattr(monitor, name, enter(f"{type(monitor).__name__}.{name}", getattr(monitor, name)))
    for name, function in stock.items():
        setattr(dist, name, count(name, function))
    try:
        yield
    finally:
        for name, function in stock.items():
            setattr(dist, name, function)


def _record_rows(seen: Seen, model: torch.nn.Module) -> None:
    """Adds up the rows that each layer's experts get in training."""
    layers = [m for m in model.modules() if isinstance(m, Experts)]
    seen.expert_rows = [0] * len(layers)
    for i, layer in enumerate(layers):

        def add(
            x: Any, rows: ExpertRows, *args: Any, i: int = i, layer: Experts = layer, real: Any = layer.compute
        ) -> Any:
            if layer.training:
                seen.expert_rows[i] += rows.weight_M.shape[0]
            return real(x, rows, *args)

        layer.compute = add  # type: ignore[method-assign]


class RowRecorder(pl.Callback):
    def __init__(self, seen: Seen) -> None:
        self.seen = seen

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.seen.expert_rows:
            _record_rows(self.seen, pl_module)


def monitored_fit(path: str, fold: str, batches: list[list[dict[str, torch.Tensor]]], spec: dict[str, Any]) -> Seen:
    """Trains on ``batches[step]``, the global batch's rows in parts that are dealt to the data ranks in order."""
    world, seen, time = dist.get_world_size(), Seen(), FakeTime()
    parsed = Fold.parse(fold, world)
    share = len(batches[0]) // parsed.dp
    first = parsed.coordinates(dist.get_rank())["dp"] * share
    mine = [join_rows(step[first : first + share]) for step in batches]
    mfu = MFUMonitor(clock=time, **{"peak_flops": 1e9, **spec.get("mfu", {})})
    load = LoadBalanceMonitor(**spec.get("load", {}))
    module = TimedCase(path, spec, time)
    counts: Counter[str] = Counter()
    with counted_collectives([mfu, load], counts):
        trainer = _trainer(fold, spec, [mfu, load, Watcher(seen, mfu, load), RowRecorder(seen)])
        for fit in range(1, 1 + spec.get("fits", 1)):
            trainer.fit_loop.max_epochs = fit * spec.get("epochs", 1)
            loader = DataLoader(BatchList(mine), batch_size=None)
            trainer.fit(module, loader, loader if spec.get("validate") else None)
    seen.collectives, seen.history, seen.peak = dict(counts), load.history, mfu.peak
    seen.logged = {name: float(value) for name, value in trainer.logged_metrics.items()}
    seen.left = sum(int(layer.load_E.sum()) for layer in module.model.moe_layers().values())
    _record_sizes(seen, module, trainer.strategy.fold)
    if "wandb" in spec:
        trainer.logger.experiment.finish()
    return seen


def _record_sizes(seen: Seen, module: TimedCase, fold: Fold) -> None:
    from lightning_moefold.parallel import local_part

    module.model.release_gathered_weights()
    parameters = list(module.parameters())
    seen.stored = sum(local_part(p).numel() for p in parameters)
    summary, optimizer = (
        summarize_model(module, fold, module.trainer.strategy.mesh.axis("pp")),
        module.optimizers().optimizer,
    )
    seen.stored_range, seen.total = summary.size_range(), summary.total.total
    states = [t for state in optimizer.state.values() for t in state.values() if t.dim() > 0]
    gradients = [p for p in parameters if p.requires_grad]
    seen.kept = tuple(sum(local_part(t).nbytes for t in tensors) for tensors in (parameters, gradients, states))
    seen.kept_range = summary.memory(optimizer)


def _trainer(fold: str, spec: dict[str, Any], callbacks: list[pl.Callback]) -> pl.Trainer:
    logger: Any = False
    if "csv" in spec:
        logger = CSVLogger(spec["csv"], name="", version="")
    if "wandb" in spec:
        logger = WandbLogger(project="test", offline=True, save_dir=spec["wandb"])
    if "save" in spec:
        callbacks = [*callbacks, ModelCheckpoint(spec["save"], every_n_train_steps=1, **spec.get("saving", {}))]
    if spec.get("summary"):
        callbacks = [*callbacks, FoldSummary()]
    return pl.Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=MoEFoldStrategy(fold=fold, **spec.get("strategy", {})),
        plugins=[PoolEnvironment()],
        precision="64-true",
        max_epochs=1,
        accumulate_grad_batches=spec.get("accumulate", 1),
        gradient_clip_val=spec.get("clip"),
        log_every_n_steps=spec.get("log_every", 1),
        num_sanity_val_steps=2 if spec.get("validate") else 0,
        val_check_interval=1 if spec.get("validate") else None,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing="save" in spec,
        logger=logger,
        callbacks=callbacks,
        default_root_dir=spec["root"],
    )

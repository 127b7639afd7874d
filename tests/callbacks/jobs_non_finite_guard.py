# SPDX-License-Identifier: Apache-2.0
"""Fits in which one batch gives a number that is not finite, in one module of one rank."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_moefold import MoECausalLM, MoEFoldStrategy, ResumableSampler
from lightning_moefold.callbacks import NonFiniteGuard
from lightning_moefold.callbacks.non_finite_guard import NonFinite
from lightning_moefold.errors import NonFiniteError
from lightning_moefold.modules.routers import RouterOptions
from lightning_moefold.optim import MasterWeights
from tests.strategy import finetune
from tests.strategy.finetune import Finetune, Report
from tests.strategy.plain_modules import trainer

#: The batch that goes wrong.
BAD = 2


class Poisoned(Finetune):
    """``module``'s output, or the gradient of it, is NaN in batch :data:`BAD` on ``rank``; without a rank that batch is left out.

    Experts have biases that follow their load, and a buffer of the user's own counts batches.
    """

    def __init__(self, path: str, **spec: Any) -> None:
        super().__init__(path, **spec)
        self.register_buffer("running", torch.zeros(()))
        self.batch_idx, self.hooked = -1, False
        self.biases: list[list[float]] = []

    def _make(self) -> MoECausalLM:
        options = RouterOptions(norm_topk_prob=True, bias_update_rate=0.01)
        return MoECausalLM.from_pretrained(self.path, output_router_logits=True, router=options)

    def on_train_start(self) -> None:
        super().on_train_start()
        modules, name = dict(self.model.named_modules()), self.spec.get("module")
        if self.spec.get("rank") == dist.get_rank() and not self.hooked:
            self.hooked = True
            modules[name].register_forward_hook(self._poison)

    def _poison(self, _: Any, __: Any, output: Any) -> Any:
        if self.batch_idx != BAD:
            return output
        if self.spec["what"] == "output":
            return output * float("nan")
        output.register_hook(lambda gradient: gradient * float("inf"))
        return output

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.batch_idx = batch_idx
        self.running += 1
        return super().training_step(batch, batch_idx)

    def train_dataloader(self) -> Any:
        steps = super().train_dataloader()
        if "rank" not in self.spec:
            left_out = (BAD, BAD + 1) if self.spec.get("both") else (BAD,)
            steps.tokens = torch.cat(
                [part for i, part in enumerate(steps.tokens.split(finetune.ROWS)) if i not in left_out]
            )
        return steps

    def on_train_batch_end(self, *args: Any) -> None:
        super().on_train_batch_end(*args)
        gates = [layer.gate for layer in self.model.moe_layers().values()]
        self.biases.append([b for gate in gates for b in gate.e_score_correction_bias.tolist()])

    def configure_optimizers(self) -> Any:
        if self.spec.get("masters"):
            return MasterWeights(torch.optim.AdamW, self.parameters(), lr=5e-3)
        return super().configure_optimizers()


def fit(
    path: str, fold: str, spec: dict[str, Any], arguments: dict[str, Any], action: str | None = "skip", **options: Any
) -> tuple[Report, list[dict[str, Any]], list[int], dict[str, Any]]:
    """Fits; returns the report, the events, the loads of experts, and what else must not change."""
    module = Poisoned(path, **spec)
    guard = None if action is None else NonFiniteGuard(action)
    options = {"num_microbatches": 1, "pipeline_schedule": "gpipe", **options}
    run = trainer(
        MoEFoldStrategy(fold=fold, **options),
        **{"precision": "64-true", "callbacks": [] if guard is None else [guard], "max_epochs": 1, "gradient_clip_val": 1.0,
           "limit_val_batches": 0, **arguments},
    )  # fmt: skip
    run.fit(module)
    report = finetune.finish(module, run)
    loads = {i: layer.load_E.clone() for i, layer in module.model.moe_layers().items()}
    events = [] if guard is None else [asdict(event) for event in guard.events]
    own = {"running": module.running.item(), "biases": module.biases, "steps": run.global_step}
    return report, events, {i: load.tolist() for i, load in loads.items()}, own


def many(path: str, cases: list[tuple[str, dict[str, Any], dict[str, Any]]]) -> list[Any]:
    return [fit(path, fold, spec, {}, **options) for fold, spec, options in cases]


def stopped(path: str, fold: str, spec: dict[str, Any], folder: str) -> tuple[str, list[str], int]:
    """A run that stops: the error, and the checkpoints that are there."""
    module, guard = Poisoned(path, **spec), NonFiniteGuard("stop")
    saver = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1, save_last=True)
    run = trainer(
        MoEFoldStrategy(fold=fold), precision=spec.get("precision", "32-true"), callbacks=[guard, saver],
        enable_checkpointing=True, max_epochs=1, limit_val_batches=0,
    )  # fmt: skip
    try:
        run.fit(module)
    except NonFiniteError as error:
        return str(error), [str(event) for event in guard.events], run.global_step
    return "", [], run.global_step


class Overflowing(Poisoned):
    """The optimizer itself makes a weight infinite."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, closure)
        if batch_idx == BAD and dist.get_rank() == self.trainer.world_size - 1:
            from lightning_moefold.parallel import local_part

            piece = local_part(self.model.get_parameter("model.layers.0.mlp.experts.up_proj"))
            piece.view(-1)[0] = float("inf")


def overflowed(path: str, fold: str, folder: str, saves: bool) -> str:
    module = Overflowing(path)
    saver = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    run = trainer(
        MoEFoldStrategy(fold=fold), callbacks=[NonFiniteGuard("skip"), *([saver] if saves else [])],
        enable_checkpointing=saves, max_epochs=1, limit_val_batches=0,
    )  # fmt: skip
    module.spec["rank"] = -1
    try:
        run.fit(module)
    except NonFiniteError as error:
        return str(error)
    return ""


def event_of(found: list[dict[str, Any]]) -> NonFinite:
    [event] = found
    return NonFinite(**event)


def spiking(path: str, fold: str) -> list[dict[str, Any]]:
    """Batches of two rows in order; the loss of the twentieth is ten times as large."""

    class Spiking(Finetune):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * (10.0 if batch_idx == 19 else 1.0)

        def train_dataloader(self) -> Any:
            rows = [{"input_ids": row, "labels": row} for row in finetune.rows(48)]
            sampler = ResumableSampler(rows, shuffle=False)
            return DataLoader(rows, batch_size=2 // self.trainer.strategy.dp_size, sampler=sampler)  # type: ignore[arg-type]

    guard = NonFiniteGuard()
    run = trainer(
        MoEFoldStrategy(fold=fold), callbacks=[guard], max_epochs=1, limit_val_batches=0, use_distributed_sampler=False
    )
    run.fit(Spiking(path, optimizer="sgd"))
    return [asdict(spike) for spike in guard.spikes]


def plain_strategy(folder: str) -> str:
    """What a Trainer without the strategy is told."""
    try:
        pl.Trainer(
            callbacks=[NonFiniteGuard()], accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=1,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        ).fit(finetune.Finetune(""))  # fmt: skip
    except ValueError as error:
        return str(error)
    return ""

# SPDX-License-Identifier: Apache-2.0
"""Jobs for the ranks of the pool: fine-tuning whose experts move, through checkpoints, exports and ExpertRebalancer."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_moefold import MoECausalLM
from lightning_moefold.adapters import LoRA
from lightning_moefold.balance.placement import Placement
from lightning_moefold.callbacks import ExpertRebalancer
from lightning_moefold.callbacks.expert_load import LoadReader
from lightning_moefold.modules import Experts, MoELayer
from lightning_moefold.optim import MasterWeights
from tests.balance.moving import RandomMoves
from tests.strategy import finetune
from tests.strategy.finetune import Finetune, Report


class Masters(Finetune):
    """Weights in bfloat16, masters in float32."""

    def configure_optimizers(self) -> Any:
        return MasterWeights(torch.optim.AdamW, self.parameters(), lr=1e-3)


class Adapted(Finetune):
    """Trains adapters of attention and experts; checkpoints leave the base out."""

    def _make(self) -> MoECausalLM:
        model = super()._make()
        model.add_adapter(LoRA(rank=2, alpha=4.0, targets=("q_proj", "experts")))
        return model


@dataclass
class Seen:
    """What one rank saw."""

    report: Report = field(default_factory=Report)
    placements: list[dict[str, Placement]] = field(default_factory=list)
    moves: list[Any] = field(default_factory=list)


class Watch(pl.Callback):
    """Notes the placements with which training begins and ends."""

    def __init__(self, seen: Seen) -> None:
        self.seen = seen

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.seen.placements.append(trainer.strategy.registry.placements())

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.seen.placements.append(trainer.strategy.registry.placements())


def fit(
    path: str, fold: str, moves: dict[str, Any] | None, folder: str | None = None, ckpt_path: str | None = None,
    export: str | None = None, masters: bool = False, adapted: bool = False,
) -> Seen:  # fmt: skip
    """Two epochs of five steps; with ``folder``, a checkpoint after each step."""
    seen = Seen()
    module = (Masters if masters else Adapted if adapted else Finetune)(path)
    callbacks: list[pl.Callback] = [Watch(seen)]
    if moves is not None:
        callbacks.append(RandomMoves(seen, **{"keep": False, **moves}))
    if folder is not None:
        callbacks.append(ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1))
    arguments = {"max_epochs": 2, "enable_checkpointing": folder is not None, "callbacks": callbacks}
    arguments |= {"precision": "bf16-true"} if masters else {"gradient_clip_val": 0.5}
    run = finetune.make(fold, arguments)
    run.fit(module, ckpt_path=ckpt_path)
    if export is not None:
        module.model.save_pretrained(export)
    seen.report = finetune.finish(module, run)
    return seen


def resume(path: str, folds: list[str], checkpoint: str, moves: dict[str, Any] | None) -> list[Seen]:
    return [fit(path, fold, moves, ckpt_path=checkpoint) for fold in folds]


def two_trainers(path: str) -> list[Any]:
    """Validation losses under a Trainer whose experts have moved, and under another with another dispatcher."""
    seen, module = Seen(), Finetune(path)
    run = finetune.make("| ep2", {"max_epochs": 1, "callbacks": [RandomMoves(seen, keep=False)]})
    run.fit(module)
    before = run.strategy.registry.placements()
    run.validate(module, verbose=False)
    run = finetune.make("| ep2", {"max_epochs": 2}, dispatcher="deduplicated")
    run.validate(module, verbose=False)
    kinds = {type(layer.dispatcher).__name__ for layer in module.model.moe_layers().values()}
    return [module.report.validation[-4:], before == run.strategy.registry.placements(), kinds]


# ---- the callback ----------------------------------------------------------------------------------------------------


@dataclass
class Rebalanced:
    """What one rank saw of a run with the callback."""

    report: Report = field(default_factory=Report)
    logged: list[dict[str, float]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    moves: int = 0
    copies: int = 0
    policy: Any = None
    rows: list[int] = field(default_factory=list)
    read: Any = None
    placements: list[dict[str, Placement]] = field(default_factory=list)


class Rows(pl.Callback):
    """Counts the rows that this rank computes in each layer, and what the counters say of all ranks."""

    def __init__(self, seen: Rebalanced) -> None:
        self.seen = seen

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.reader = LoadReader(trainer, module)
        layers = [m for m in module.modules() if isinstance(m, Experts)]
        self.seen.rows = [0] * len(layers)
        for i, layer in enumerate(layers):
            self._count(i, layer)

    def _count(self, i: int, layer: Experts) -> None:
        compute = layer.compute

        def counted(x: Any, rows: Any, *args: Any) -> Any:
            self.seen.rows[i] += rows.weight_M.shape[0] if layer.training else 0
            return compute(x, rows, *args)

        layer.compute = counted  # type: ignore[method-assign]

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        figures = {k: float(v) for k, v in trainer.logged_metrics.items() if k.startswith("balance/")}
        self.seen.logged.append(figures)
        self.seen.placements.append(trainer.strategy.registry.placements())

    def on_train_end(self, *_: Any) -> None:
        self.seen.read = self.reader.read().rank_rows_LR


def rebalance(path: str, fold: str, arguments: dict[str, Any] | None) -> Rebalanced:
    """Five steps, with ExpertRebalancer if it has arguments; ``pool`` among them is a file for each rank."""
    seen, output = Rebalanced(), io.StringIO()
    if arguments is not None and "pool" in arguments:
        arguments = arguments | {"pool": arguments["pool"][dist.get_rank()]}
    module = Finetune(path)
    callback = None if arguments is None else ExpertRebalancer(**arguments)
    callbacks = ([] if callback is None else [callback]) + [Rows(seen)]
    run = finetune.make(fold, {"max_epochs": 1, "callbacks": callbacks, "log_every_n_steps": 1})
    with redirect_stdout(output):
        run.fit(module)
    seen.report = finetune.finish(module, run)
    seen.said = [line for line in output.getvalue().splitlines() if line.startswith("ExpertRebalancer")]
    if callback is not None:
        seen.moves, seen.copies = callback.moves, callback.copies
        copies = run.strategy.settings.dispatch.copies
        seen.policy = None if copies is None else copies.policy
    return seen


class OneBlock(pl.LightningModule):
    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.layer = MoELayer(8, 4, 2, **{"ffn_hidden_size": 8, **arguments})

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        return self.layer(batch).square().mean()

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.randn(8, 4, 8), batch_size=2)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Factored(torch.optim.SGD):
    """Keeps a sum for each column of a stack, over all experts."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["columns"] = torch.zeros(p.shape[-1], dtype=p.dtype)
        return loss


class FactoredBlock(OneBlock):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return Factored(self.parameters(), lr=0.1)


def refusals() -> dict[str, str]:
    """What is refused, and in which words."""
    dropping = {"ffn_hidden_size": None, "expert": lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1))}
    tries: dict[str, tuple[pl.LightningModule, str, dict[str, Any], Any]] = {
        "ep = 1": (OneBlock(), "tp2", {}, None),
        "random numbers": (OneBlock(**dropping), "| ep2", {}, None),
        "transformer engine": (OneBlock(), "| ep2", {"expert_kernel": "transformer_engine"}, None),
        "padding": (OneBlock(), "| ep2", {"capacity_factor": 1.0, "pad_to_capacity": True}, None),
        "no permutation": (OneBlock(), "| ep2", {}, lambda load_NE, current, costs: Placement((0, 0, 1, 2), 2)),
        "another layer's": (OneBlock(), "| ep2", {}, lambda load_NE, current, costs: Placement.contiguous(6, 2)),
        "no layer": (_Plain(), "", {}, None),
        "unknown state": (FactoredBlock(), "| ep2", {}, None),
    }
    return {name: _refusal(*case) for name, case in tries.items()}


class _Plain(OneBlock):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)


def _refusal(module: pl.LightningModule, fold: str, options: dict[str, Any], policy: Any) -> str:
    callback = ExpertRebalancer(policy or "smartmoe_greedy", interval=1, margin=0.0)
    arguments = {"max_epochs": 1, "callbacks": [callback], "precision": "32-true"}
    run = finetune.make(fold, arguments, **options)
    try:
        run.fit(module)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return f"nothing was refused, {np.sum(callback.moves)} moved"


def refused_moves() -> list[str]:
    """What strategy.move_experts refuses; afterwards training goes on."""
    seen: list[str] = []

    class Tries(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            mine = Placement((0, 2, 1, 3) if trainer.global_rank else (3, 2, 1, 0), 2)
            for placements in (
                {"other": Placement.contiguous(4, 2)},
                {"layer": Placement.contiguous(4, 4)},
                {"layer": mine},
            ):
                try:
                    trainer.strategy.move_experts(placements)
                except Exception as error:
                    seen.append(f"{type(error).__name__}: {error}")

    run = finetune.make("| ep2", {"max_steps": 1, "callbacks": [Tries()], "precision": "32-true"})
    run.fit(OneBlock())
    return seen

# SPDX-License-Identifier: Apache-2.0
"""Runs a training case in one rank of the pool: an ordinary LightningModule under an ordinary Trainer."""

from __future__ import annotations

import fnmatch
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_moefold import Fold, MoECausalLM, MoEFoldStrategy
from lightning_moefold.lifecycle.precision import MoEFoldPrecision
from lightning_moefold.modules import logit_chunks, offload
from lightning_moefold.modules.experts import cpu_cache
from lightning_moefold.testing import PoolEnvironment
from lightning_moefold.testing.pieces import Piece, owned_pieces
from tests.balance.moving import RandomMoves

_MIXED = MoEFoldPrecision.mixed_dtype


@dataclass
class RankRun:
    """What one rank saw."""

    losses: list[float] = field(default_factory=list)
    lm_losses: list[float] = field(default_factory=list)
    aux_losses: list[float | None] = field(default_factory=list)
    grads: list[dict[str, Piece]] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    weights: dict[str, Piece] = field(default_factory=dict)
    fold: str = ""
    loads: dict[int, torch.Tensor] = field(default_factory=dict)
    dropped: int = 0
    dispatchers: set[str] = field(default_factory=set)
    copies: int = 0
    moves: list[tuple[dict[str, Piece], dict[str, Piece]]] = field(default_factory=list)


class BatchList(Dataset):
    def __init__(self, batches: list[dict[str, torch.Tensor]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.batches[index]


class Stream(IterableDataset):
    """The same, of unknown length."""

    def __init__(self, batches: list[dict[str, torch.Tensor]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return iter(self.batches)


class Case(pl.LightningModule):
    def __init__(self, path: str, run: RankRun, spec: dict[str, Any]) -> None:
        super().__init__()
        self.path, self.run, self.spec, self.model = path, run, spec, None

    def configure_model(self) -> None:
        if self.model is not None:
            return
        self.model = MoECausalLM.from_pretrained(self.path, self.spec.get("storage"), **self.spec.get("overrides", {}))
        if "adapter" in self.spec:
            self.model.load_adapter(self.spec["adapter"])
        if "lora" in self.spec:
            self.model.add_adapter(self.spec["lora"])
        for name, parameter in self.model.named_parameters():
            if any(fnmatch.fnmatch(name, pattern) for pattern in self.spec.get("frozen", ())):
                parameter.requires_grad_(False)

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        if self.spec.get("shift_tokens_by_rank"):
            batch = {**batch, "input_ids": (batch["input_ids"] + dist.get_rank()) % self.model.config.vocab_size}
        self.batch = batch
        output = self.model(**batch)
        self.run.losses.append(output.loss.item())
        self.run.lm_losses.append(output.lm_loss.item())
        self.run.aux_losses.append(None if output.aux_loss is None else output.aux_loss.item())
        return output.loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.run.grads.append(owned_pieces(self.model, "grad"))
        if self.spec.get("peek"):
            with torch.no_grad():
                self.model(**self.batch)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:  # type: ignore[no-untyped-def]
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        norm = self.trainer.precision_plugin.grad_norm
        if norm is not None:
            self.run.grad_norms.append(norm.item())

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.parameters() if p.requires_grad]
        if callable(make := self.spec.get("optimizer")):  # as one process makes it, by the same names
            made = make({n: p for n, p in self.model.named_parameters() if p.requires_grad})
            return ([made[0]], [{"scheduler": made[1], "interval": "step"}]) if isinstance(made, tuple) else made
        if self.spec.get("optimizer", "adamw") == "sgd":
            return torch.optim.SGD(parameters, lr=self.spec.get("lr", 1e-2), momentum=0.9)
        kernel = self.spec.get("adamw", {})
        return torch.optim.AdamW(
            parameters, lr=self.spec.get("lr", 1e-2), betas=(0.9, 0.95), weight_decay=0.1, **kernel
        )


class ZeroingCase(Case):
    """Clears the gradients of the whole module, of what the optimizer does not hold, too; after forward, as Lightning does."""

    def optimizer_zero_grad(self, *_: Any) -> None:
        self.zero_grad()


def train(path: str, fold: str, batches: list[list[dict[str, torch.Tensor]]], spec: dict[str, Any]) -> RankRun:
    """Trains on ``batches[step][data rank]``; one optimizer step per ``accumulate`` batches."""
    run = RankRun()
    module = (ZeroingCase if spec.get("zero_everything") else Case)(path, run, spec)
    with (
        mock.patch.dict(logit_chunks.CHUNK_ELEMENTS, {"cpu": spec.get("chunk_elements", 1 << 22)}),
        mock.patch.object(cpu_cache, "SMALLEST", 256),  # small models, too
        mock.patch.object(offload, "SMALLEST", 256),
        mock.patch.object(offload, "DEVICES", {"cpu"}),
        # What is stored in another dtype is computed in float64, too.
        mock.patch.object(MoEFoldPrecision, "mixed_dtype", torch.float64 if "storage" in spec else _MIXED),
    ):
        _fit(module, fold, batches, spec)
    run.weights = owned_pieces(module.model)
    run.fold = str(module.model.fold)
    run.loads = {number: layer.load_E.clone() for number, layer in module.model.moe_layers().items()}
    run.dispatchers = {type(layer.dispatcher).__name__ for layer in module.model.moe_layers().values()}
    run.copies = sum(layer.copies.copies for layer in module.model.moe_layers().values())
    run.dropped = sum(int(layer.dropped) for layer in module.model.moe_layers().values())
    return run


def _fit(module: Case, fold: str, batches: list[list[dict[str, torch.Tensor]]], spec: dict[str, Any]) -> None:
    strategy = MoEFoldStrategy(
        fold=fold,
        num_microbatches=spec.get("num_microbatches"),
        data_parallel_sharding=spec.get("sharding", "optimizer"),
        context_parallel_exchange=spec.get("exchange", "auto"),
        recompute=spec.get("recompute"),
        offload_activations=spec.get("offload", False),
        calculate_per_token_loss=spec.get("per_token"),
        **spec.get("dispatch", {}),
        **spec.get("pipeline", {}),
    )
    world = dist.get_world_size()
    dp_rank = Fold.parse(fold, world).coordinates(dist.get_rank())["dp"]
    kind = Stream if spec.get("stream") else BatchList
    loader = DataLoader(kind([step[dp_rank] for step in batches]), batch_size=None)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=strategy,
        plugins=[PoolEnvironment()],
        precision=spec.get("precision", "64-true"),
        max_epochs=1,
        accumulate_grad_batches=spec.get("accumulate", 1),
        gradient_clip_val=spec.get("clip"),
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
        callbacks=[RandomMoves(module.run, **spec["moves"])] if "moves" in spec else [],
        default_root_dir=tempfile.gettempdir(),
    )
    trainer.fit(module, loader)

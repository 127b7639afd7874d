# SPDX-License-Identifier: Apache-2.0
"""Jobs for the ranks of the pool: an ordinary fine-tuning module, its batches cut for any number of data ranks."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor

from lightning_moefold import MoECausalLM, MoEFoldStrategy
from lightning_moefold.parallel import local_part
from lightning_moefold.testing.pieces import Piece, owned_pieces, piece_of
from tests.strategy.plain_modules import trainer

#: Rows of a global batch.
ROWS = 8
LENGTH = 6
VOCABULARY = 96


def rows(count: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(seed))


class Steps:
    """Global batch k is rows ``k * ROWS ...``, dealt to the data ranks; remembers where it is, so that runs resume."""

    def __init__(self, tokens: Tensor, dp_rank: int, dp_size: int) -> None:
        self.tokens, self.dp_rank, self.dp_size = tokens, dp_rank, dp_size
        self.done = self.start = 0

    def __len__(self) -> int:
        return -(-len(self.tokens) // ROWS)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        first, self.start = self.start, 0
        for step in range(first, len(self)):
            self.done = step + 1
            mine = self.tokens[step * ROWS : (step + 1) * ROWS][self.dp_rank :: self.dp_size]
            yield {"input_ids": mine, "labels": mine}

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["done"]


@dataclass
class Report:
    """What a rank has seen."""

    losses: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    counters: list[int] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    weights: dict[str, Piece] = field(default_factory=dict)
    loaded: dict[str, Piece] = field(default_factory=dict)
    state: dict[str, Piece] = field(default_factory=dict)
    loaded_state: dict[str, Piece] = field(default_factory=dict)
    best: str = ""
    log: list[str] = field(default_factory=list)


def state_pieces(optimizer: torch.optim.Optimizer, model: MoECausalLM) -> dict[str, Piece]:
    """Optimizer state that this rank owns, as weights are compared."""
    names = {id(p): name for name, p in model.named_parameters()}
    pieces: dict[str, Piece] = {}
    for parameter, values in optimizer.state.items():
        name = names[id(parameter)]
        layout = model.layouts[name]
        for key, value in values.items():
            if value.shape == parameter.shape and layout.is_owner(model.fold, model.rank):
                pieces[f"{name}.{key}"] = piece_of(local_part(value).clone(), layout, model.fold, model.rank)
            elif value.dim() == 0 and model.rank == layout.owners(model.fold, list(range(model.fold.world_size)))[0][0]:
                pieces[f"{name}.{key}"] = (((0,),), (1,), (value.reshape(1).clone(),))
    return pieces


class Finetune(pl.LightningModule):
    def __init__(self, path: str, early: bool = False, **spec: Any) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.path, self.spec, self.report = path, spec, Report()
        self.model: MoECausalLM | None = None
        if early:  # in __init__ rather than in configure_model
            self.model = self._make()

    def _make(self) -> MoECausalLM:
        quantize = self.spec.get("quantize")
        model = MoECausalLM.from_pretrained(self.path, quantize=quantize, output_router_logits=True)
        if "adapter" in self.spec:
            model.add_adapter(self.spec["adapter"])
        for name in self.spec.get("thawed", ()):
            model.get_parameter(name).requires_grad_()
        for name, parameter in model.named_parameters():
            if any(fnmatch.fnmatch(name, pattern) for pattern in self.spec.get("frozen", ())):
                parameter.requires_grad_(False)
        return model

    def configure_model(self) -> None:
        self.report.log.append("configure_model")
        if self.model is None:
            self.model = self._make()

    def on_train_start(self) -> None:
        self.report.loaded = owned_pieces(self.model)
        self.report.loaded_state = state_pieces(self.trainer.optimizers[0], self.model)

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        loss = self.model(**batch).loss
        self.report.losses.append(loss.item())
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        output = self.model(**batch)
        assert not torch.is_inference_mode_enabled()
        self.report.validation.append(output.loss.item())
        self.log("val/loss", output.loss)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("test/loss", self.model(**batch).loss)

    def predict_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        return self.model(batch["input_ids"], gather_logits=True).logits.argmax(-1)

    def on_train_batch_end(self, *_: Any) -> None:
        self.report.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    def configure_optimizers(self) -> Any:
        members = [p for p in self.parameters() if p.requires_grad]
        if self.spec.get("optimizer") == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(members, lr=0.05, momentum=0.9)
        else:
            kind = self.spec.get("kernel", {})
            optimizer = torch.optim.AdamW(members, lr=5e-3, weight_decay=0.1, **kind)
        schedule = self.spec.get("schedule")
        if schedule == "step":
            warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 5))
            return [optimizer], [{"scheduler": warmup, "interval": "step"}]
        if schedule == "epoch":
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]
        if schedule == "plateau":
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val/loss"}}
        return optimizer

    def steps(self, count: int, seed: int) -> Steps:
        strategy = self.trainer.strategy
        return Steps(rows(count, seed), strategy.dp_rank, strategy.dp_size)

    def train_dataloader(self) -> Steps:
        return self.steps(self.spec.get("train_rows", 5 * ROWS), 0)

    def val_dataloader(self) -> Steps:
        return self.steps(self.spec.get("val_rows", 2 * ROWS), 1)

    def test_dataloader(self) -> Steps:
        return self.steps(2 * ROWS, 2)

    def predict_dataloader(self) -> Steps:
        return self.steps(self.spec.get("predict_rows", 2 * ROWS), 3)


def make(fold: str, arguments: dict[str, Any], **options: Any) -> pl.Trainer:
    options = {"num_microbatches": 1, "pipeline_schedule": "gpipe", **options}  # so that a pipeline changes no number
    return trainer(MoEFoldStrategy(fold=fold, **options), **{"precision": "64-true", **arguments})


def finish(module: Finetune, run: pl.Trainer) -> Report:
    report = module.report
    report.metrics = {k: v.item() for k, v in run.callback_metrics.items()}
    report.counters += [run.global_step, run.current_epoch]
    if module.model is not None:
        report.weights = owned_pieces(module.model)
        if run.optimizers:
            report.state = state_pieces(run.optimizers[0], module.model)
    if run.checkpoint_callback is not None:
        report.best = Path(run.checkpoint_callback.best_model_path).name
    return report


def fit(
    path: str, fold: str, spec: dict[str, Any], arguments: dict[str, Any], ckpt_path: str | None = None,
    folder: str | None = None, **checkpoint: Any,
) -> Report:  # fmt: skip
    """Fits; with ``folder``, checkpoints go there."""
    module = Finetune(path, **spec)
    callbacks: list[Any] = []
    if folder is not None:
        callbacks.append(ModelCheckpoint(folder, **{"filename": "{step}", "save_top_k": -1, **checkpoint}))
    if "patience" in spec:
        callbacks.append(EarlyStopping("val/loss", patience=spec["patience"], min_delta=100.0))
    run = make(fold, {"callbacks": callbacks, "enable_checkpointing": folder is not None, **arguments})
    run.fit(module, ckpt_path=ckpt_path)
    return finish(module, run)

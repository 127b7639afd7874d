# SPDX-License-Identifier: Apache-2.0
"""Jobs about the life of a Trainer with an MoE module."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_moefold.errors import InputError
from lightning_moefold.testing.pieces import owned_pieces
from tests.strategy import finetune
from tests.strategy.finetune import Finetune, Report, make


def entry_points(path: str, fold: str, early: bool) -> dict[str, Any]:
    """fit, validate, test and predict on one Trainer; fit again; then everything with a new Trainer."""
    module = Finetune(path, early=early)
    run = make(fold, {"max_epochs": 1})
    seen: dict[str, Any] = {}
    run.fit(module)
    first = owned_pieces(module.model)
    model, mesh = module.model, module.model.mesh
    seen["validated"] = run.validate(module)[0]["val/loss"]
    seen["tested"] = run.test(module)[0]["test/loss"]
    seen["predicted"] = [batch.shape for batch in run.predict(module)]
    run.fit_loop.max_epochs = 2
    run.fit(module)
    seen["steps"] = run.global_step
    assert module.model is model
    assert model.mesh is mesh
    # Lightning uses inference mode under NCCL only: a run over gloo does not show whether it is switched off.
    loops = (run.validate_loop, run.test_loop, run.predict_loop, run.fit_loop.epoch_loop.val_loop)
    assert not any(loop.inference_mode for loop in loops)
    again = make(fold, {"max_epochs": 1})
    seen["validated again"] = again.validate(module)[0]["val/loss"]
    again.fit(module)
    assert module.model is model
    seen["losses"] = module.report.losses
    seen["weights"] = owned_pieces(module.model)
    seen["first"] = first
    try:
        make(fold, {"max_epochs": 1, "precision": "bf16-mixed"}).fit(module)
    except InputError as error:
        seen["other precision"] = str(error)
    return seen


def keep_best(path: str, fold: str, folder: str, weights_only: bool) -> dict[str, Any]:
    """Two best of five, and the last; then by the names that Trainer knows."""
    module = Finetune(path, schedule="step")
    keep = ModelCheckpoint(
        folder, monitor="train/loss", mode="max", save_top_k=2, save_last=True, every_n_train_steps=1,
        save_weights_only=weights_only, filename="{step}",
    )  # fmt: skip
    run = make(fold, {"max_epochs": 1, "callbacks": [keep], "enable_checkpointing": True})
    run.fit(module)
    files = sorted(p.name for p in Path(folder).iterdir())
    seen: dict[str, Any] = {"files": files, "losses": module.report.losses}
    final = run.validate(module)[0]["val/loss"]
    for name in ("best", "last"):
        seen[name] = run.validate(module, ckpt_path=name)[0]["val/loss"]
    seen["final"] = final
    if weights_only:
        try:
            make(fold, {"max_epochs": 2}).fit(Finetune(path), ckpt_path=keep.last_model_path)
        except Exception as error:
            seen["error"] = f"{type(error).__name__}: {error}"
    return seen


def cases(path: str, fold: str, runs: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[Report]:
    return [finetune.fit(path, fold, spec, arguments) for spec, arguments in runs]


def callback_state(path: str, folder: str) -> str:
    """Hyper-parameters that could not be read back are an error when they are written."""
    module = Finetune(path, where=Path(folder), odd=torch.nn.Linear)
    run = make("", {"max_steps": 1})
    run.fit(module)
    try:
        run.save_checkpoint(Path(folder, "odd.ckpt"))
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    assert not Path(folder, "odd.ckpt").exists()
    del module.hparams["odd"]
    run.save_checkpoint(Path(folder, "path.ckpt"))
    run.validate(module, ckpt_path=str(Path(folder, "path.ckpt")))
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(Path(folder, "path.ckpt"))
    return message


class Composite(Finetune):
    """An MoE model beside modules of the user's own, one of them a second name for a part of the model."""

    def configure_model(self) -> None:
        if self.model is None:
            model = self._make()
            self.norm_alias = model.model.norm  # before the model itself, so that this is the name torch finds first
            self.model = model
            self.scale = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
            self.note = Note()

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss = super().training_step(batch, index)
        rows = batch["input_ids"].double().mean(1, keepdim=True)
        return loss + self.scale(rows).square().mean()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.spec.get("peek"):  # gathers weights between backward and step
            with torch.no_grad():
                self.report.validation.append(self.model(finetune.rows(4, 9), gather_logits=True).logits.sum().item())

    def on_train_start(self) -> None:
        self.report.loaded = owned_pieces(self.model)


class Note(nn.Module):
    """Something that is no tensor in the state dict."""

    text = "empty"

    def get_extra_state(self) -> str:
        return self.text

    def set_extra_state(self, state: str) -> None:
        self.text = state

    def forward(self) -> None: ...


def composite(path: str, fold: str, folder: str, peek: bool) -> dict[str, Any]:
    module = Composite(path, peek=peek)
    run = make(fold, {"max_steps": 3, "gradient_clip_val": 0.5})
    run.fit(module)
    module.note.text = "written"
    seen: dict[str, Any] = {"weights": owned_pieces(module.model), "losses": module.report.losses}
    seen["own"] = {n: v.clone() for n, v in module.state_dict().items() if n.startswith("scale")}
    run.save_checkpoint(Path(folder, "composite.ckpt"))
    other = Composite(path)
    again = make(fold, {"max_steps": 3})
    again.fit(other, ckpt_path=str(Path(folder, "composite.ckpt")))
    seen["loaded"] = owned_pieces(other.model)
    seen["own loaded"] = {n: v.clone() for n, v in other.state_dict().items() if n.startswith("scale")}
    seen["note"] = other.note.text
    return seen


def outside(path: str) -> list[float]:
    """The model without a Trainer, trained by hand; and its twin under one."""
    from lightning_moefold import MoECausalLM

    torch.set_default_dtype(torch.float64)
    model = MoECausalLM.from_pretrained(path, output_router_logits=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.1)
    losses = []
    for batch in finetune.Steps(finetune.rows(5 * finetune.ROWS), 0, 1):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def predict(path: str, fold: str, predict_rows: int) -> Any:
    run = make(fold, {})
    return [batch.tolist() for batch in run.predict(Finetune(path, predict_rows=predict_rows))]


def kernels(path: str, fold: str, folder: str) -> list[Report]:
    """One AdamW over both meshes, by each of torch's implementations, saved and resumed."""
    reports = []
    for kind in ({"foreach": False}, {"foreach": True}, {"fused": True}):
        name = next(iter(kind)) + str(next(iter(kind.values())))
        spec = {"kernel": kind, "train_rows": 2 * finetune.ROWS}
        finetune.fit(path, fold, spec, {"max_epochs": 1}, folder=str(Path(folder, name)), every_n_train_steps=1)
        reports.append(
            finetune.fit(path, fold, spec, {"max_epochs": 2}, ckpt_path=str(Path(folder, name, "step=2.ckpt")))
        )
    return reports


class Accumulating(Finetune):
    """Notes whether gradients are held in pieces between the batches of a step."""

    def on_after_backward(self) -> None:
        if not self.trainer.fit_loop._should_accumulate():
            return
        weights = [p for p in self.model.parameters() if isinstance(p, torch.distributed.tensor.DTensor)]
        self.report.counters.append(sum(p.grad is not None for p in weights) - len(weights))


def accumulated(path: str, fold: str, sharding: str) -> Report:
    module = Accumulating(path)
    run = make(fold, {"max_steps": 2, "accumulate_grad_batches": 2}, data_parallel_sharding=sharding)
    run.fit(module)
    counters = list(module.report.counters)
    report = finetune.finish(module, run)
    report.counters = counters
    return report

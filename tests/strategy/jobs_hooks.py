# SPDX-License-Identifier: Apache-2.0
"""Jobs with hooks on gradients: only some rows of the embedding and one expert are to learn."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader
from wandb.integration.torch.wandb_torch import TorchHistory

from tests.strategy.finetune import Finetune, make, rows
from tests.strategy.jobs_bad_input import told

FIRST_ROW, EXPERT = 90, 1


def mask(name: str, gradient: Tensor) -> Tensor:
    if name.endswith("embed_tokens.weight"):
        keep = torch.arange(len(gradient)) >= FIRST_ROW
    elif ".experts." in name:
        keep = torch.arange(len(gradient)) == EXPERT
    else:
        return gradient
    return gradient * keep.view(-1, *[1] * (gradient.dim() - 1))


def edit(name: str, parameter: Tensor) -> None:
    parameter.grad.copy_(mask(name, parameter.grad))


class Hooked(Finetune):
    """Registers a kind of hook, at a time."""

    calls = 0

    def configure_model(self) -> None:
        super().configure_model()
        self._register("configure_model")

    def on_train_start(self) -> None:
        self.before = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self._register("on_train_start")

    def _register(self, when: str) -> None:
        if self.spec["when"] != when:
            return
        self.handles = []
        for name, parameter in self.model.named_parameters():
            if self.spec["kind"] == "hook":
                self.handles.append(parameter.register_hook(lambda g, n=name: mask(n, g)))
            elif self.spec["kind"] == "post":
                self.handles.append(parameter.register_post_accumulate_grad_hook(functools.partial(edit, name)))
        if self.spec["kind"].startswith("wandb"):
            history = TorchHistory()
            watch = (
                history.add_log_parameters_hook if "weights" in self.spec["kind"] else history.add_log_gradients_hook
            )
            if self.trainer.is_global_zero:  # as loggers do
                watch(self, log_freq=1)
            return
        layer = next(iter(self.model.model.layers.values()))  # the first that this stage has
        if self.spec["kind"] == "module":
            self.handles.append(layer.register_full_backward_hook(self._count))
        elif self.spec["kind"] == "pre":
            self.handles.append(layer.register_full_backward_pre_hook(self._count))

    def _count(self, *_: Any) -> None:
        self.calls += 1

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self._register("on_train_batch_start")
        if batch_idx == 1 and self.spec.get("remove"):
            for handle in self.handles:
                handle.remove()


def one_rank(path: str, kind: str, when: str, remove: bool = False) -> tuple[dict[str, list[int]], int]:
    """Rows of embedding and experts that moved, and calls of a module's hook, in three steps of plain descent."""
    module = Hooked(path, kind=kind, when=when, optimizer="sgd", remove=remove)
    make("", {"max_steps": 3}).fit(module)
    moved = {}
    for name, parameter in module.model.named_parameters():
        if name.endswith("embed_tokens.weight") or ".experts." in name:
            change = (parameter.detach() - module.before[name]).abs().flatten(1).amax(1)
            moved[name] = change.nonzero().flatten().tolist()
    return moved, module.calls


def refused(path: str, fold: str, arguments: dict[str, Any]) -> dict[str, tuple[str, int]]:
    """What each kind of hook is told, and the steps that were done before."""
    outcome = {}
    for kind in ("hook", "post", "module", "pre", "wandb weights", "wandb gradients"):
        for when in ("configure_model", "on_train_start", *(["on_train_batch_start"] if kind == "post" else [])):
            module = Hooked(path, kind=kind, when=when)
            run = make(fold, {"max_steps": 1, **arguments})
            outcome[f"{kind} in {when}"] = told(lambda r=run, m=module: r.fit(m)), len(module.report.losses)
    return outcome


class Uploading(CSVLogger):
    """As the loggers that upload models have it."""

    _log_model = True


def loggers(path: str, folder: str) -> tuple[str, int, str]:
    """What a logger that uploads models is told, the steps before, and that it is fine where nothing is saved."""
    module = Finetune(path)
    saving = {"callbacks": [ModelCheckpoint(folder)], "enable_checkpointing": True}
    message = told(lambda: make("", {"max_steps": 1, "logger": Uploading(folder), **saving}).fit(module))
    steps = len(module.report.losses)
    dry = told(lambda: make("", {"fast_dev_run": True, **saving}).fit(Finetune(path)))
    assert dry == "no error", dry
    return message, steps, told(lambda: make("", {"max_steps": 1, "logger": Uploading(folder)}).fit(Finetune(path)))


class Shuffled(Finetune):
    """A loader that shuffles, with or without a generator of its own."""

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(7) if self.spec["generator"] else None
        return DataLoader([{"input_ids": row, "labels": row} for row in rows(16)], 8, shuffle=True, generator=generator)


def warned(path: str, generator: bool) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make("", {"max_steps": 1}).fit(Shuffled(path, generator=generator))
    return [str(w.message) for w in caught if "generator" in str(w.message)]

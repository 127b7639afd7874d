# SPDX-License-Identifier: Apache-2.0
"""Jobs in which a second Trainer runs a module under other settings than the first."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import lightning_moefold.strategy as strategy
from lightning_moefold import AutoFold, MoEFoldStrategy
from lightning_moefold.modules import DecoderLayer, MoELayer
from lightning_moefold.parallel import local_part
from tests.strategy.finetune import Finetune, Steps
from tests.strategy.jobs_bad_input import told
from tests.strategy.plain_modules import trainer

#: What a Trainer is told rather than its strategy.
TRAINER = ("precision", "accumulate_grad_batches")


class _Unequal(Steps):
    """Every second batch has few labels."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for step, batch in enumerate(super().__iter__()):
            few = torch.where(batch["input_ids"] < 30, batch["input_ids"], -100)
            yield {**batch, "labels": few if step % 2 else batch["labels"]}


class Changing(Finetune):
    """Learns nothing at first, so that a fresh module has the same weights."""

    lr = 0.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def steps(self, count: int, seed: int) -> Steps:
        plain = super().steps(count, seed)
        return _Unequal(plain.tokens, plain.dp_rank, plain.dp_size)


def _trainer(options: dict[str, Any], **more: Any) -> Any:
    own = {name: value for name, value in options.items() if name in TRAINER}
    arguments = {name: value for name, value in options.items() if name not in TRAINER}
    if arguments.get("fold") == "auto":
        arguments["auto"] = AutoFold(global_batch_size=8, sequence_length=6)
    return trainer(MoEFoldStrategy(**arguments), **{"precision": "64-true", **own, **more})


def _describe(module: Changing, *, trained: bool) -> dict[str, Any]:
    """What the parts of a module have been told, and what they trained with."""
    model = module.model
    assert model is not None
    parts: dict[str, Any] = {"microbatches": model.num_microbatches, "exchange": model.context_parallel_exchange}
    for name, part in model.named_modules():
        if isinstance(part, MoELayer):
            parts[name] = type(part.dispatcher).__name__, part.dispatcher.config, getattr(part.experts, "kernel", None)
        elif isinstance(part, DecoderLayer):
            parts[name] = part.recompute, part.offload, part._compiled is not None
    if model.pipeline is not None:
        runner = model.pipeline.runner  # type: ignore[attr-defined]
        parts["pipeline"] = runner.plan.schedule, [s.index for s in runner.stages]
        if trained:
            parts["schedule"] = type(runner._schedule).__name__, runner._schedule._n_microbatches
    groups = [dist.group.WORLD, *(model.mesh._groups if model.mesh is not None else ())]
    parts["timeouts"] = {g._get_backend(torch.device("cpu")).options._timeout for g in groups}
    return parts


def _observe(module: Changing, options: dict[str, Any]) -> dict[str, Any]:
    """Validates and trains: losses, weights, and what the parts were told meanwhile."""
    report, module.lr = module.report, 0.05
    report.losses.clear(), report.validation.clear()
    _trainer(options).validate(module, verbose=False)
    parts = [_describe(module, trained=False)]
    _trainer(options, max_steps=2, limit_val_batches=0).fit(module)
    parts.append(_describe(module, trained=True))
    module.model.release_gathered_weights()
    weights = {name: local_part(parameter).clone() for name, parameter in module.named_parameters()}
    return {"told": parts, "losses": [*report.validation, *report.losses], "weights": weights}


def change(path: str, first: dict[str, Any], second: dict[str, Any]) -> tuple[Any, Any, Any]:
    """What the parts of a module were told under ``first``; what it does under ``second`` then, and a fresh one does."""
    module, world = Changing(path), dist.group.WORLD
    timeout = world._get_backend(torch.device("cpu")).options._timeout
    try:
        with mock.patch.object(strategy, "COMPILER", "eager"):
            _trainer(first, max_steps=1, limit_val_batches=0).fit(module)
            before = _describe(module, trained=True)
            return before, _observe(module, second), _observe(Changing(path), second)
    finally:
        dist.distributed_c10d._set_pg_timeout(timeout, world)


def refusals(path: str, first: dict[str, Any], seconds: dict[str, dict[str, Any]]) -> dict[str, str]:
    """What a module that was trained under ``first`` is told of each of the others, which change nothing."""
    module = Changing(path)
    _trainer(first, max_steps=1, limit_val_batches=0).fit(module)
    before, said = _describe(module, trained=True), {}
    for name, options in seconds.items():
        said[name] = told(lambda o=options: _trainer(o).validate(module, verbose=False))
        assert {**before, "timeouts": None} == {**_describe(module, trained=True), "timeouts": None}
    _trainer(first).validate(module, verbose=False)  # it goes on as before
    return said


LONG, SHORT = timedelta(minutes=20), timedelta(minutes=7)

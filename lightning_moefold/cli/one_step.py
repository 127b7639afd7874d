# SPDX-License-Identifier: Apache-2.0
"""What commands share that do their work in one step of prediction: there the ranks have their weights, and no gradients."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_moefold.cli.terminal import peers_end_too, quiet
from lightning_moefold.models import MoECausalLM
from lightning_moefold.strategy import MoEFoldStrategy


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that say where and how a model runs."""
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="DIR", help="model and tokenizer in Hugging Face format")
    add("--fold", default="", help='parallel sizes, such as "tp2 | ep4"; the rest is data parallel')
    add("--devices", type=int, default=1, help="ranks on this node")
    add("--num-nodes", type=int, default=1, help="nodes")
    add("--accelerator", default="auto", choices=["auto", "cpu", "cuda"], help="auto: cuda where there is one")
    add("--precision", default="bf16-true", choices=["bf16-true", "bf16-mixed", "32-true", "64-true"])
    add("--num-microbatches", type=int, metavar="N", help="of a call, with a pipeline (as many as it has ranks)")


def make_trainer(arguments: argparse.Namespace) -> pl.Trainer:
    """Returns a Trainer for these arguments."""
    from lightning_moefold.cli.fit import launched

    quiet()
    number, pipeline = arguments.num_microbatches, re.search(r"\bpp(\d+)", arguments.fold)
    if number is None and pipeline:
        number = int(pipeline[1])
    accelerator = arguments.accelerator
    if accelerator == "auto":  # Lightning's own takes an Apple GPU, on which it runs no strategy of several ranks
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    places = {"devices": arguments.devices, "num_nodes": arguments.num_nodes} | launched()
    return pl.Trainer(
        strategy=MoEFoldStrategy(fold=arguments.fold, num_microbatches=number), accelerator=accelerator,
        precision=arguments.precision, logger=False, enable_checkpointing=False, enable_model_summary=False,
        enable_progress_bar=False, use_distributed_sampler=False, **places,
    )  # fmt: skip


class OneStep(pl.LightningModule):
    """A model, and what is done with it.

    Args:
        make: Makes the model.
        work: Called once, on all ranks, without gradients.

    Attributes:
        result: What it returned.
    """

    def __init__(self, make: Callable[[], MoECausalLM], work: Callable[[MoECausalLM], Any]) -> None:
        super().__init__()
        self._make, self._work = make, work
        self.model: MoECausalLM | None = None
        self.result: Any = None

    @override
    def configure_model(self) -> None:
        if self.model is None:
            self.model = self._make()

    @override
    def predict_step(self, batch: Tensor, batch_idx: int) -> None:
        assert self.model is not None
        self.result = self._work(self.model)


def run_once(trainer: pl.Trainer, make: Callable[[], MoECausalLM], work: Callable[[MoECausalLM], Any]) -> Any:
    """Makes a model under a Trainer's strategy, calls ``work(model)`` on all ranks, and returns the result of this rank."""
    step = OneStep(make, work)
    with peers_end_too(trainer):
        trainer.predict(step, DataLoader(TensorDataset(torch.zeros(1)), batch_size=1), return_predictions=False)
    return step.result

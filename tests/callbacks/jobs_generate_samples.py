# SPDX-License-Identifier: Apache-2.0
"""A training run in one rank of the pool, in which text is generated, or not."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from lightning_moefold.callbacks import GenerateSamples
from lightning_moefold.testing.pieces import owned_pieces
from tests.strategy.finetune import Finetune, finish, make

PROMPTS = ["abc", "b", "hello", "zz", "abc"]


class Letters:
    """A tokenizer whose tokens are letters, and beyond them numbers."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) - ord("a") for letter in text]}

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return " ".join(str(token) for token in tokens)


class Writing(Finetune):
    """Generates in every kind of place during fit."""

    def _write(self) -> None:
        place, size = self.trainer.strategy.dp_rank, self.trainer.strategy.dp_size
        prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])[: 1 + (place + 1) % size]
        assert torch.equal(self.model.generate(prompt, max_new_tokens=2 + place % 2)[:, :3], prompt)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss = super().training_step(batch, index)
        self._write()  # between forward and backward
        assert self.model.training
        return loss

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        super().validation_step(batch, index)
        self._write()
        assert not self.model.training

    def on_train_batch_end(self, *_: Any) -> None:
        self._write()
        super().on_train_batch_end()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._write()


def fit(path: str, fold: str, sampled: bool, sharding: str) -> dict[str, Any]:
    """Four epochs; the table that W&B was given, if any."""
    samples = GenerateSamples(
        PROMPTS, Letters(), every_n_validations=2, max_new_tokens=5, do_sample=True, eos_token_id=()
    )
    logger = mock.Mock(spec=WandbLogger, save_dir=None, version=None)
    arguments = {"callbacks": [samples], "logger": logger} if sampled else {}
    module = (Writing if sampled else Finetune)(path, train_rows=16, val_rows=8)
    run = make(fold, {"max_epochs": 4, "accumulate_grad_batches": 2, **arguments}, data_parallel_sharding=sharding)
    run.fit(module)
    report = finish(module, run)
    model = module.model
    loads = {i: layer.load_E.clone() for i, layer in model.moe_layers().items()}
    return {
        "losses": report.losses, "validation": report.validation, "weights": owned_pieces(model), "loads": loads,
        "latest": samples.samples, "tables": [call.args for call in logger.log_table.call_args_list],
        "random": torch.get_rng_state(),
    }  # fmt: skip

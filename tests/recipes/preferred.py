# SPDX-License-Identifier: Apache-2.0
"""Jobs for the ranks of the pool: preference losses under a Trainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_moefold import MoEFoldStrategy
from lightning_moefold.recipes import PreferenceData, PreferenceModule
from lightning_moefold.testing.pieces import Piece, owned_pieces
from tests.strategy.plain_modules import trainer


@dataclass
class Seen:
    """What a rank has seen."""

    losses: list[float] = field(default_factory=list)
    totals: list[float] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    reference: torch.Tensor | None = None
    weights: dict[str, Piece] = field(default_factory=dict)
    load: float = 0.0


class Recorded(PreferenceModule):
    def on_train_start(self) -> None:
        super().on_train_start()
        layers = self.model.moe_layers().values()
        self.seen = Seen(load=sum(float(layer.load_E.sum()) for layer in layers))

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        total = super().training_step(batch, batch_idx)
        self.seen.totals.append(total.item())
        self.seen.losses.append(self.trainer.callback_metrics["train/loss"].item())
        return total


def fit(
    folder: str, loss: str, fold: str, microbatches: int = 1, save: str | None = None, resume: str | None = None,
    steps: int = 3, **options: Any,
) -> Seen:  # fmt: skip
    """Three steps on ``folder/LOSS.jsonl``."""
    kind = "feedback" if loss == "kto" else "preference"
    data = PreferenceData(
        [f"{folder}/{kind}.jsonl"], f"{folder}/checkpoint", kind, 96, 4, seed=2, val_fraction=0.2,
        cache_dir=f"{folder}/tokens",
    )  # fmt: skip
    module = Recorded(
        f"{folder}/checkpoint",
        loss,
        0.3,
        1.0,
        1.5 if loss == "kto" else 1.0,
        2e-3,
        warmup_steps=0,
        schedule="constant",
        **options,
    )
    callbacks = [ModelCheckpoint(save, filename="{step}", save_top_k=-1, every_n_train_steps=1)] if save else []
    run = trainer(
        MoEFoldStrategy(fold=fold, num_microbatches=microbatches), precision="64-true", num_sanity_val_steps=0,
        max_steps=steps, callbacks=callbacks, enable_checkpointing=bool(save), max_epochs=-1,
    )  # fmt: skip
    run.fit(module, data, ckpt_path=resume)
    run.validate(module, data, verbose=False)
    module.seen.metrics = {name: value.item() for name, value in run.callback_metrics.items()}
    module.seen.reference = module._reference["train"]
    module.seen.weights = owned_pieces(module.model)
    return module.seen


def several(cases: list[dict[str, Any]]) -> list[Seen]:
    """Runs one after another on the same ranks."""
    return [fit(**case) for case in cases]

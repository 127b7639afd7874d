# SPDX-License-Identifier: Apache-2.0
"""Jobs for the ranks of the pool: training and validation on rows with padding in every place."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_moefold import MoEFoldStrategy
from lightning_moefold.recipes import FineTuneModule
from tests.strategy.plain_modules import trainer

MASKS = (
    (1, 1, 1, 1, 1, 1, 1, 1, 1, 1),
    (0, 0, 0, 1, 1, 1, 1, 1, 1, 1),
    (1, 1, 1, 1, 1, 1, 0, 0, 0, 0),
    (1, 1, 0, 0, 0, 0, 0, 1, 1, 1),
    (0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
    (1, 1, 1, 1, 2, 2, 2, 3, 3, 3),
    (0, 0, 4, 4, 4, 4, 1, 1, 1, 0),
    (2, 2, 0, 0, 2, 2, 3, 0, 0, 3),
)


def rows(vocabulary: int) -> list[dict[str, Tensor]]:
    """A row for each mask, with all labels, padding's included."""
    token_BS = torch.randint(vocabulary, (len(MASKS), len(MASKS[0])), generator=torch.Generator().manual_seed(5))
    return [
        {"input_ids": token_S, "labels": token_S, "attention_mask": torch.tensor(mask)}
        for token_S, mask in zip(token_BS, MASKS, strict=True)
    ]


def losses(path: str, fold: str, microbatches: int, ranks: int) -> tuple[list[float], float]:
    """Losses of training, and the loss of validation on batches of other rows."""
    module = FineTuneModule(path, learning_rate=1e-2, warmup_steps=0, schedule="constant", weight_decay=0.0)
    run = trainer(
        MoEFoldStrategy(fold=fold, num_microbatches=microbatches), precision="64-true", max_epochs=1,
        num_sanity_val_steps=0,
    )  # fmt: skip
    seen: list[float] = []
    step = module.training_step

    def training_step(batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = step(batch, batch_idx)
        seen.append(loss.item())
        return loss

    module.training_step = training_step  # type: ignore[method-assign]
    data = rows(96)
    run.fit(module, DataLoader(data, batch_size=4 // ranks), DataLoader(data[::-1], batch_size=2 // ranks))
    return seen, run.callback_metrics["val/loss"].item()


def validation(path: str, batch_size: int) -> float:
    run = trainer(MoEFoldStrategy(), precision="64-true")
    [seen] = run.validate(FineTuneModule(path), DataLoader(rows(96), batch_size=batch_size), verbose=False)
    return seen["val/loss"]

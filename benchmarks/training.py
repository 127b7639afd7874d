# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks that train share: a module that fine-tunes a model of this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_moefold import MoECausalLM, MoEFoldStrategy


class Finetune(pl.LightningModule):
    """A model from a checkpoint, trained with AdamW as a user would write it.

    Args:
        path: The checkpoint, in Hugging Face format.
        **options: Of ``MoECausalLM.from_pretrained``.
    """

    def __init__(self, path: str | Path, **options: Any) -> None:
        super().__init__()
        self.path, self.options = path, options
        self.model: MoECausalLM | None = None

    def configure_model(self) -> None:
        if self.model is None:
            self.model = MoECausalLM.from_pretrained(self.path, **self.options)

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        assert self.model is not None
        loss = self.model(**batch).loss
        assert loss is not None
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    @property
    def folded(self) -> MoEFoldStrategy:
        """The strategy of the run."""
        strategy = self.trainer.strategy
        assert isinstance(strategy, MoEFoldStrategy)
        return strategy

# SPDX-License-Identifier: Apache-2.0
"""Jobs that train with the recipes' module and save what comes out in both ways."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from lightning_moefold.recipes import FineTuneModule
from tests.strategy import finetune
from tests.strategy.finetune import Steps


def train_and_save(path: str, fold: str, folder: str) -> None:
    """One step with the load-balancing loss, as ``moefold fit`` makes it; ``saved`` and ``run.ckpt`` in the folder."""
    module = FineTuneModule(path, warmup_steps=0, learning_rate=1e-3)
    run = finetune.make(fold, {"max_steps": 1, "precision": "32-true"})
    tokens = torch.randint(3, 96, (8, 6), generator=torch.Generator().manual_seed(0))
    run.fit(module, Steps(tokens, dist.get_rank(), dist.get_world_size()))
    assert "train/aux_loss" in run.callback_metrics
    module.model.save_pretrained(Path(folder, "saved"))
    run.save_checkpoint(Path(folder, "run.ckpt"))

# SPDX-License-Identifier: Apache-2.0
"""Training of packed models on ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from torch.utils.data import DataLoader

from lightning_moefold.fold import Fold
from lightning_moefold.strategy import MoEFoldStrategy
from lightning_moefold.testing import PoolEnvironment
from lightning_moefold.testing.pieces import owned_pieces
from lightning_moefold.testing.verification import RankRecord, _Module, train_on_rank

OVERRIDES = {"output_router_logits": True}


def train_packed(cases: list[tuple[dict[str, Any], Any]], path: str) -> list[RankRecord]:
    """Trains on the batches of each case under its strategy."""
    return [train_on_rank(path, OVERRIDES, batches, arguments) for arguments, batches in cases]


def train_in_two_runs(path: str, folds: tuple[str, str], batches: Any, folder: str) -> RankRecord:
    """Trains one step under a fold, the next one under another, from the first one's checkpoint, and exports."""
    record, world = RankRecord(), dist.get_world_size()
    for step, fold in enumerate(folds):
        module = _Module(path, OVERRIDES, record)
        trainer = pl.Trainer(
            accelerator="cpu", devices=world, strategy=MoEFoldStrategy(fold=fold), plugins=[PoolEnvironment()],
            precision="64-true", max_steps=step + 1, gradient_clip_val=0.5, use_distributed_sampler=False, logger=False,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder,
        )  # fmt: skip
        place = Fold.parse(fold, world).coordinates(dist.get_rank())
        data = DataLoader([batches[step][place["dp"]]], batch_size=None)  # an epoch of one batch
        trainer.fit(module, data, ckpt_path=str(Path(folder) / "first.ckpt") if step else None)
        if not step:
            trainer.save_checkpoint(Path(folder) / "first.ckpt")
    assert module.model is not None
    module.model.save_pretrained(Path(folder) / "saved")
    record.weights = owned_pieces(module.model)
    return record

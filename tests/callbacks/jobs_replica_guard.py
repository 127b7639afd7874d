# SPDX-License-Identifier: Apache-2.0
"""Jobs of tests/callbacks/test_replica_guard.py."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from lightning_moefold import MoEFoldStrategy
from lightning_moefold.callbacks import ReplicaGuard
from lightning_moefold.errors import ReplicaError
from lightning_moefold.parallel import local_part
from tests.strategy.finetune import Finetune
from tests.strategy.plain_modules import trainer


class Flipped(Finetune):
    """After the second step one element of ``parameter`` differs on ``rank`` in its last bit."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1 and dist.get_rank() == self.spec.get("rank"):
            piece = local_part(self.get_parameter(self.spec["parameter"]).data).view(-1)
            piece[-1] += piece[-1].abs() * 1e-15 + 1e-300


def fit(path: str, fold: str, sharding: str, spec: dict[str, Any]) -> str:
    run = trainer(
        MoEFoldStrategy(fold=fold, data_parallel_sharding=sharding, num_microbatches=2, pipeline_schedule="gpipe"),
        precision="64-true", callbacks=[ReplicaGuard(every_n_steps=1)], max_epochs=1, limit_val_batches=0,
    )  # fmt: skip
    try:
        run.fit(Flipped(path, **spec))
    except ReplicaError as error:
        return str(error)
    return f"{run.global_step} steps"

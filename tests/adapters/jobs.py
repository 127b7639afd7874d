# SPDX-License-Identifier: Apache-2.0
"""The shipped module with an adapter, on a rank of the pool."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_moefold import Fold, LoRA, MoECausalLM, MoEFoldStrategy
from lightning_moefold.mesh import FoldedMesh
from lightning_moefold.parallel import PipelinePlan, Settings, parallelize
from lightning_moefold.recipes import FineTuneModule
from tests.strategy.finetune import ROWS, Steps, rows
from tests.strategy.jobs_bad_input import told
from tests.strategy.plain_modules import trainer


class Recorded(FineTuneModule):
    """Remembers its losses, and in what dtype the adapter of a router and of attention is while they compute."""

    thawed: str | None = None

    def configure_model(self) -> None:
        super().configure_model()
        if self.thawed is not None:
            self.model.get_parameter(self.thawed).requires_grad_(True)

    def on_train_start(self) -> None:
        super().on_train_start()
        self.losses: list[float] = []
        self.dtypes: dict[str, torch.dtype] = {}
        layer = self.model.model.layers["0"]
        for name, module in (("router", layer.mlp.gate), ("attention", layer.self_attn.q_proj)):
            module.register_forward_hook(lambda m, *_, name=name: self.dtypes.update({name: m.lora_A.dtype}))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.item())
        return loss

    def train_dataloader(self) -> Steps:
        return Steps(rows(5 * ROWS).repeat(4, 1), self.trainer.strategy.dp_rank, self.trainer.strategy.dp_size)


def fit(
    path: str, fold: str, lora: Any, precision: Any = "bf16-mixed", thawed: str | None = None
) -> tuple[list[float], dict[str, torch.dtype], int]:
    """Losses of a run, dtypes, and for how many parameters the optimizer holds state."""
    module = Recorded(path, adapter=lora, learning_rate=2e-2, warmup_steps=1, schedule="constant")
    module.thawed = thawed
    run = trainer(MoEFoldStrategy(fold=fold), precision=precision, max_epochs=1)
    run.fit(module)
    return module.losses, module.dtypes, len(run.optimizers[0].state)


def thaw(path: str, fold: str) -> list[str]:
    """Errors of a training call, and of the next one, when a parameter of the last stage's base has begun to train."""
    model = MoECausalLM.from_pretrained(path, torch.bfloat16)
    model.add_adapter(LoRA(rank=2))
    mesh = FoldedMesh(Fold.parse(fold, dist.get_world_size()), "cpu")
    parallelize(model, mesh, Settings(plan=PipelinePlan("1f1b"), num_microbatches=2), torch.device("cpu"))
    ids, norms = rows(4), [p for name, p in model.named_parameters() if name == "model.norm.weight"]
    found = []
    for trains in (True, False):
        for norm in norms:
            norm.requires_grad_(trains)
        found.append(told(lambda: model(ids, labels=ids).loss.backward()))
    return found

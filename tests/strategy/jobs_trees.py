# SPDX-License-Identifier: Apache-2.0
"""Jobs with models of which a part has been wrapped, replaced, added or taken away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, parametrize, prune

from lightning_moefold import MoECausalLM
from lightning_moefold.modules import Attention
from tests.strategy.finetune import Finetune, make
from tests.strategy.jobs_bad_input import told


class _Adapter(nn.Module):
    """As LoRA wraps a projection."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A, self.lora_B = nn.Linear(32, 2, bias=False), nn.Linear(2, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class _Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def _adapter(model: MoECausalLM) -> None:
    attention = model.model.layers["1"].self_attn
    attention.o_proj = _Adapter(attention.o_proj)


def _compiled(model: MoECausalLM) -> None:
    model.model.layers["0"] = torch.compile(model.model.layers["0"], backend="eager")


def _resized(model: MoECausalLM) -> None:
    model.model.embed_tokens.weight = nn.Parameter(torch.empty(100, 32, device="meta"))


def _shared(model: MoECausalLM) -> None:
    model.model.layers["1"] = model.model.layers["0"]


def _linear(model: MoECausalLM) -> None:
    model.model.layers["0"].self_attn.q_proj = nn.Linear(32, 64, bias=False, device="meta")


#: What is done to a model, and what the sentence says.
CASES: dict[str, tuple[Callable[[MoECausalLM], Any], str]] = {
    "adapter": (_adapter, "model.model.layers.1.self_attn.o_proj is a _Adapter where the model has its own Linear"),
    "compiled": (_compiled, "model.model.layers.0 is wrapped by torch.compile"),
    "parametrized": (
        lambda m: parametrize.register_parametrization(m.lm_head, "weight", _Double(), unsafe=True),
        "model.lm_head.parametrizations",
    ),
    "weight_norm": (
        lambda m: parametrizations.weight_norm(m.model.layers["0"].self_attn.q_proj),
        "model.model.layers.0.self_attn.q_proj.parametrizations",
    ),
    "pruned": (lambda m: prune.identity(m.lm_head, "weight"), "model.lm_head.weight_orig"),
    "added head": (lambda m: m.add_module("value", nn.Linear(32, 1)), "model.value (Linear) is no part"),
    "added buffer": (lambda m: m.register_buffer("scale", torch.ones(1)), "model.scale (Tensor) is no part"),
    "another projection": (_linear, "q_proj is a Linear where the model has its own Linear"),
    "resized": (_resized, "'model.model.embed_tokens.weight' has the shape [100, 32]"),
    "removed norm": (lambda m: setattr(m.model, "norm", nn.Identity()), "model.model.norm is a Identity where"),
    "shared layer": (_shared, "has no 'model.model.layers.1'"),
    "fully_shard": (lambda m: fully_shard(m.model), "model.model is wrapped by fully_shard"),
}  # fmt: skip


class Changed(Finetune):
    def configure_model(self) -> None:
        if self.model is None:
            super().configure_model()
            CASES[self.spec["case"]][0](self.model)


class CompiledInPlace(Finetune):
    def configure_model(self) -> None:
        if self.model is None:
            super().configure_model()
            self.model.model.layers["0"].self_attn.compile(backend="eager")


def refused(path: str, fold: str) -> dict[str, str]:
    return {case: told(lambda c=case: make(fold, {"max_steps": 1}).fit(Changed(path, case=c))) for case in CASES}


def compiled_in_place(path: str) -> tuple[list[float], list[float]]:
    """Losses with a part that is compiled, and without."""
    losses = []
    counters.clear()
    for kind in (CompiledInPlace, Finetune):
        module = kind(path)
        make("", {"max_steps": 2}).fit(module)
        losses.append(module.report.losses)
    assert counters["frames"]["ok"], "nothing was compiled"
    return losses[0], losses[1]


class _OwnNetwork(pl.LightningModule):
    """A network of the user's own, around a block."""

    def __init__(self, change: str) -> None:
        super().__init__()
        self.attention = Attention(32, 4)
        if change == "wrapped":
            self.attention.o_proj = _Adapter(self.attention.o_proj)
        self.head = parametrizations.weight_norm(nn.Linear(32, 1))  # the user's own, which nobody cuts
        self.losses: list[float] = []

    def training_step(self, x: Tensor, _: int) -> Tensor:
        loss = self.head(self.attention(x)).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(
            torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(0)), batch_size=2
        )


def own_network(fold: str, change: str) -> tuple[str, list[float]]:
    torch.manual_seed(0)
    module = _OwnNetwork(change)
    message = told(lambda: make(fold, {"max_steps": 2, "precision": "32-true"}).fit(module))
    return message, module.losses

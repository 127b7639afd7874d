# SPDX-License-Identifier: Apache-2.0
"""Probes that run on every rank of many folds: over which ranks gradients are summed, what the norm counts, where tokens go."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightning_moefold import MoECausalLM, MoEFoldStrategy
from lightning_moefold.dispatch import Choices, DispatchConfig, ExpertAxes
from lightning_moefold.dispatch.deduplicated import DeduplicatedDispatcher
from lightning_moefold.dispatch.registry import DISPATCHERS
from lightning_moefold.mesh import FoldedMesh
from lightning_moefold.modules.experts.kernels import read_tokens, sum_rows
from lightning_moefold.parallel import local_part
from lightning_moefold.testing import PoolEnvironment
from tests.exactness.runs import BatchList

EXPERTS, TOP = 8, 2
ADAPTED = ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj", "shared_expert_gate", "gate", "experts"]


@dataclasses.dataclass
class Found:
    """Of one fold, on one rank.

    Attributes:
        powers: By parameter, the value of its gradient's elements (all the same on a rank) after backward and reductions, if
            the backward of every rank r gives 2 ** r.
        norm: The global norm if every gradient is one.
        clipped: The same after clipping to one.
        parameters: Of the whole model with its adapter.
        adapter: Shapes of A and B by name.
        identity: Largest difference between tokens and what comes back from experts that change nothing.
    """

    powers: dict[str, float] = dataclasses.field(default_factory=dict)
    norm: float = 0.0
    clipped: float = 0.0
    parameters: int = 0
    adapter: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    identity: float = 0.0


class Probed(pl.LightningModule):
    """One training step in which the gradient of every weight, as its layer's backward computes it, becomes 2 ** rank."""

    def __init__(self, path: str, found: Found) -> None:
        super().__init__()
        self.path, self.found, self.model = path, found, None

    def configure_model(self) -> None:
        if self.model is None:
            self.model = MoECausalLM.from_pretrained(self.path, output_router_logits=True)
            self.model.add_adapter({"rank": 3, "targets": ADAPTED})
            self.model.requires_grad_(True)  # the base as well

    def on_train_start(self) -> None:
        # In a pipeline backward is over when the model returns its loss, and what its schedule has computed goes on as it is.
        self.fill = _Fill(2.0 ** dist.get_rank())
        stages = [] if self.model.pipeline is None else self.model.pipeline.stages  # which are no parts of the model
        for module in (*self.model.modules(), *stages):
            if any(True for _ in module.parameters()):
                module.register_forward_pre_hook(self.fill)

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        loss = self.model(**batch).loss
        if self.trainer.strategy.fold.pp > 1:
            self.fill.remove()
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for name, parameter in self.model.named_parameters():
            values = local_part(parameter.grad).unique()
            assert len(values) <= 1, f"{name} holds {values[:5].tolist()}"
            if len(values):
                self.found.powers[name] = float(values)
        for parameter in self.model.parameters():
            local_part(parameter.grad).fill_(1.0)
        norm = self.trainer.strategy.precision_plugin.gradient_norm
        members = list(self.parameters())
        self.found.norm = norm.total(members).item()
        norm.clip(members, 1.0)
        self.found.clipped = norm.total(members).item()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class _Fill:
    """A hook before forward: replaces the gradient of the weights that are in use from there on.

    Weights are gathered by the module that holds them or one around it, and are used by either, so it is hooked to all.
    """

    def __init__(self, value: float) -> None:
        self.value = value
        self.handles: list[Any] = []

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def __call__(self, module: nn.Module, _: Any) -> None:
        for parameter in module.parameters():
            if parameter.requires_grad and torch.is_grad_enabled():
                self.handles.append(parameter.register_hook(self.fill))

    def fill(self, grad: Tensor) -> Tensor:
        if not isinstance(grad, DTensor):
            return torch.full_like(grad, self.value)
        filled = torch.full_like(grad.to_local(), self.value)
        return DTensor.from_local(
            filled, grad.device_mesh, grad.placements, run_check=False, shape=grad.shape, stride=grad.stride()
        )


def probe(paths: list[str], folds: list[str], shardings: list[str]) -> list[Found]:
    """All probes of all folds, one after the other in this process group."""
    return [_probe(*case) for case in zip(paths, folds, shardings, strict=True)]


def _probe(path: str, fold: str, sharding: str) -> Found:
    found = Found()
    module = Probed(path, found)
    strategy = MoEFoldStrategy(
        fold=fold, num_microbatches=1, pipeline_schedule="gpipe", data_parallel_sharding=sharding  # type: ignore[arg-type]
    )  # fmt: skip
    trainer = pl.Trainer(
        accelerator="cpu", devices=dist.get_world_size(), strategy=strategy, plugins=[PoolEnvironment()], precision="64-true",
        max_steps=1, use_distributed_sampler=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, logger=False,
    )  # fmt: skip
    tokens = torch.arange(16).view(2, 8) * 5 % 96
    trainer.fit(module, DataLoader(BatchList([{"input_ids": tokens, "labels": tokens}]), batch_size=None))
    assert module.model is not None
    assert module.model.adapter is not None
    found.adapter = module.model.adapter.shapes
    found.parameters = module.model.config.num_parameters() + sum(map(math.prod, found.adapter.values()))
    found.identity = _identity(strategy.mesh)
    return found


def _identity(mesh: FoldedMesh) -> float:
    """Tokens of which no two are alike on any two ranks, through experts that change nothing; weights sum to one.

    An expert is cut over etp: each rank gives its share of every token, and the shares differ. Largest difference over all
    dispatchers.
    """
    generator = torch.Generator().manual_seed(mesh.rank)
    tokens = 3 + 2 * mesh.rank
    x = torch.randn(tokens, 4, generator=generator, dtype=torch.float64) + 100 * mesh.rank
    expert = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP] for _ in range(tokens)])
    weight = torch.rand(tokens, TOP, generator=generator, dtype=torch.float64)
    weight = weight / weight.sum(1, keepdim=True)
    parts = torch.arange(1.0, mesh.etp.size + 1, dtype=torch.float64)
    share = parts[mesh.etp.index] / parts.sum()
    worst = 0.0
    for name, kind in DISPATCHERS.items():
        config = DispatchConfig(name, node_size=2)
        axes = ExpertAxes.of(mesh, config)
        kind = DeduplicatedDispatcher if name == "hierarchical" and axes.nodes is None else kind
        dispatcher = kind(config, EXPERTS, TOP, axes)
        [parcel] = dispatcher.dispatch_preprocess(x, Choices(weight, expert))
        parcel = dispatcher.token_dispatch(parcel)
        arrived, rows = dispatcher.dispatch_postprocess(parcel)
        y = sum_rows(read_tokens(arrived, rows) * share * rows.weight_M.unsqueeze(1), rows, arrived.shape[0])
        back = dispatcher.token_combine(dispatcher.combine_preprocess(y, parcel.plan), parcel.plan)
        worst = max(worst, float((dispatcher.combine_postprocess([back], [parcel.plan]) - x).abs().max()))
    return worst

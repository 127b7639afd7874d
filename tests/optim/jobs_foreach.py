# SPDX-License-Identifier: Apache-2.0
"""Jobs: optimizers that take all parameters in one call, on parameters of all kinds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer
from torch.utils.data import DataLoader

from lightning_moefold import MoEFoldStrategy
from lightning_moefold.modules import MoELayer
from lightning_moefold.optim import MasterWeights
from lightning_moefold.optim.pieces import run_on_pieces
from lightning_moefold.parallel import local_part
from tests.exactness.optimizers import Lion
from tests.strategy.plain_modules import trainer

STEPS = 2
Factory = Callable[[Iterable[nn.Parameter]], Optimizer]

#: What torch offers, and one from elsewhere: all that treat elements one by one.
OPTIMIZERS: dict[str, tuple[Factory, Factory]] = {
    name: (partial(kind, **{**options, **many}), partial(kind, **{**options, "foreach": False}))
    for name, kind, options, many in (
        ("adamw", torch.optim.AdamW, {}, {}),
        ("adam amsgrad", torch.optim.Adam, {"amsgrad": True, "weight_decay": 0.1}, {}),
        ("sgd", torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, {}),
        ("adagrad", torch.optim.Adagrad, {}, {}),
        ("rmsprop", torch.optim.RMSprop, {"centered": True, "momentum": 0.9}, {}),
        ("adadelta", torch.optim.Adadelta, {}, {}),
        ("nadam", torch.optim.NAdam, {}, {}),
        ("radam", torch.optim.RAdam, {}, {}),
        ("adamax", torch.optim.Adamax, {}, {}),
        ("asgd", torch.optim.ASGD, {"weight_decay": 0.1}, {}),
        ("maximize", torch.optim.AdamW, {"maximize": True}, {}),
        ("adamw fused", torch.optim.AdamW, {"amsgrad": True}, {"fused": True}),
        ("sgd fused", torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, {"fused": True}),
        ("adagrad fused", torch.optim.Adagrad, {}, {"fused": True}),
        ("lion", Lion, {"lr": 0.01}, {"foreach": True}),
    )
}


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Optimizers of torch take lists by default, as they do of parameters on CUDA."""
    devices = [*torch_optimizer._get_foreach_kernels_supported_devices(), "cpu"]
    with mock.patch.object(torch_optimizer, "_get_foreach_kernels_supported_devices", return_value=devices):
        yield


class Network(pl.LightningModule):
    """Parameters of its own beside a MoE layer. An optimizer by default, or by an expression."""

    def __init__(self, optimizer: Factory = torch.optim.AdamW, clears: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.moe, self.head = nn.Linear(8, 16), MoELayer(16, 4, 2, 8), nn.Linear(16, 1)
        self.make, self.clears = optimizer, clears

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return self.head(self.moe(self.up(batch.to(self.up.weight.dtype)))).float().square().mean()

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.parameters())
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        optimizer.zero_grad(set_to_none=not self.clears)


def fit(fold: str, sharding: str, precision: str, module: Network) -> Network:
    run = trainer(
        MoEFoldStrategy(fold=fold, data_parallel_sharding=sharding), max_steps=STEPS, precision=precision,
        gradient_clip_val=0.1,
    )  # fmt: skip
    data = torch.randn(32, 4, 8, generator=torch.Generator().manual_seed(1))
    run.fit(module, DataLoader(data, batch_size=2))
    return module


def _same(one: list[Tensor], two: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) if a.numel() else 0.0 for a, b in zip(one, two, strict=True))


def runs(fold: str, sharding: str, precision: str, kinds: list[str]) -> list[float]:
    """How far runs with optimizers that take lists end from one that takes parameters one by one."""
    makes: dict[str, Any] = {
        "one by one": partial(torch.optim.AdamW, foreach=False),
        "default": torch.optim.AdamW,
        "fused": partial(torch.optim.AdamW, fused=True),
        "master one by one": partial(MasterWeights, torch.optim.AdamW, foreach=False),
        "master": partial(MasterWeights, torch.optim.AdamW),
    }
    found = []
    for kind in kinds:
        with as_on_cuda():
            module = fit(fold, sharding, precision, Network(makes[kind], clears=kind == "fused"))
        found.append([local_part(p).double() for p in module.parameters()])
    return [_same(one, found[0]) for one in found[1:]]


def kinds_of(parameters: list[nn.Parameter]) -> set[Any]:
    """Meshes of DTensors, and None for plain tensors."""
    return {p.device_mesh if isinstance(p, DTensor) else None for p in parameters}


def every_optimizer(fold: str, sharding: str, precision: str) -> tuple[int, dict[str, float | str]]:
    """Kinds of parameters, and how far each optimizer on lists ends from the same on one plain piece after the other."""
    module = fit(fold, sharding, precision, Network())
    parameters = list(module.parameters())
    start = [local_part(p).clone() for p in parameters]

    def steps(make: Factory, members: list[nn.Parameter]) -> list[Tensor]:
        draw = torch.Generator().manual_seed(dist.get_rank())
        optimizer = make(members)
        run_on_pieces(optimizer)
        for _ in range(STEPS):
            for p in members:
                p.grad = torch.zeros_like(p)
                local_part(p.grad).copy_(torch.randn(local_part(p).shape, generator=draw))
            optimizer.step()
        return [local_part(p).clone() for p in members]

    errors: dict[str, float | str] = {}
    for name, (many, one) in OPTIMIZERS.items():
        for p, value in zip(parameters, start, strict=True):
            local_part(p).copy_(value)
        expected = steps(one, [nn.Parameter(value.clone()) for value in start])
        try:
            with as_on_cuda():
                errors[name] = _same(steps(many, parameters), expected)
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"
    return len(kinds_of(parameters)), errors

# SPDX-License-Identifier: Apache-2.0
"""Optimizers as users configure them, made alike in one process and on a rank: functions of the parameters by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_moefold.optim import Muon

Parameters = Mapping[str, nn.Parameter]
LR = 1e-2


def plain(parameters: Parameters, kind: str, **options: Any) -> Optimizer:
    """One group of everything."""
    return getattr(torch.optim, kind)(parameters.values(), lr=LR, **options)


def fused(parameters: Parameters) -> Optimizer:
    """In one process gate and up are halves of one tensor, and torch's fused kernel is wrong on such views."""
    whole = all(p.is_contiguous() for p in parameters.values())
    return torch.optim.AdamW(parameters.values(), lr=LR, weight_decay=0.1, fused=whole)


def no_decay_on_norms(parameters: Parameters) -> Optimizer:
    """Weight decay on matrices only."""
    flat = {n for n, p in parameters.items() if p.dim() == 1}
    groups = [
        {"params": [p for n, p in parameters.items() if n not in flat], "weight_decay": 0.3},
        {"params": [p for n, p in parameters.items() if n in flat], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LR)


def groups_with_schedules(parameters: Parameters) -> tuple[Optimizer, LambdaLR]:
    """Experts, router and the rest at rates of their own, each on its own schedule."""

    def group(*patterns: str) -> list[nn.Parameter]:
        return [p for n, p in parameters.items() if any(part in n for part in patterns)]

    routed = (".experts.", ".mlp.gate.")
    rest = [p for n, p in parameters.items() if not any(part in n for part in routed)]
    groups = [
        {"params": group(".experts."), "lr": 3 * LR, "betas": (0.8, 0.9)},
        {"params": group(".mlp.gate."), "lr": LR / 10},
        {"params": rest},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR)
    return optimizer, LambdaLR(optimizer, [lambda t: 1 / (t + 1), lambda t: float(t > 0), lambda t: (t + 1) / 3])


def groups_by_place(parameters: Parameters) -> tuple[Optimizer, LambdaLR]:
    """Both ends of the model at rates of their own: on a pipeline stage some of the groups are empty."""
    ends = ("model.embed_tokens.", "lm_head.")
    first, last = ([p for n, p in parameters.items() if n.startswith(end)] for end in ends)
    rest = [p for n, p in parameters.items() if not n.startswith(ends)]
    optimizer = torch.optim.AdamW(
        [{"params": first, "lr": LR / 2}, {"params": rest}, {"params": last, "lr": 2 * LR}], lr=LR
    )
    return optimizer, LambdaLR(optimizer, [lambda t: 1 / (t + 1), lambda t: 1.0, lambda t: (t + 1) / 3])


def some_parameters(parameters: Parameters) -> Optimizer:
    """Only attention and experts are given to the optimizer; the others have gradients that nobody uses."""
    chosen = [p for n, p in parameters.items() if "self_attn" in n or ".experts.down_proj" in n]
    return torch.optim.AdamW(chosen, lr=LR)


class Lion(Optimizer):
    """A small optimizer from outside torch, by plain operations or by ``torch._foreach`` ones over all parameters."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.99), foreach: bool = False) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": 0.1})
        self.foreach = foreach

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            members = [p for p in group["params"] if p.grad is not None]
            for p in members:
                self.state[p].setdefault("exp_avg", torch.zeros_like(p))
            averages = [self.state[p]["exp_avg"] for p in members]
            (self._step_foreach if self.foreach else self._step)(group, members, averages)
        return loss

    @staticmethod
    def _step(group: dict[str, Any], members: list[nn.Parameter], averages: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        for p, average in zip(members, averages, strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(group["lr"] * (beta1 * average + (1 - beta1) * p.grad).sign())
            average.lerp_(p.grad, 1 - beta2)

    @staticmethod
    def _step_foreach(group: dict[str, Any], members: list[nn.Parameter], averages: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        grads = [p.grad for p in members]
        updates = torch._foreach_mul(averages, beta1)
        torch._foreach_add_(updates, grads, alpha=1 - beta1)
        torch._foreach_sign_(updates)
        torch._foreach_mul_(members, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(members, updates, alpha=-group["lr"])
        torch._foreach_lerp_(averages, grads, 1 - beta2)


def lion(parameters: Parameters, foreach: bool) -> Optimizer:
    """The optimizer from outside."""
    return Lion(parameters.values(), LR, foreach=foreach)


class PlainMuon(Optimizer):
    """Muon as one writes it for whole tensors: the oracle of :class:`lightning_moefold.optim.Muon`."""

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters.values(), {"lr": LR})
        self.names = {id(p): n for n, p in parameters.items()}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            if p.grad is None:
                continue
            name, state = self.names[id(p)], self.state[p]
            if p.dim() < 2 or any(part in name for part in ("embed_tokens", "lm_head", ".gate.")):
                if not state:
                    state["adamw"] = torch.optim.AdamW([p], lr=LR / 4, betas=(0.9, 0.95), weight_decay=0.1)
                state["adamw"].step()
                continue
            buffer = state.setdefault("buffer", torch.zeros_like(p))
            buffer.mul_(0.95).add_(p.grad, alpha=0.05)
            update = 0.05 * p.grad + 0.95 * buffer
            p.mul_(1 - LR * 0.1)
            matrices = [(p, update)] if p.dim() == 2 else zip(p, update, strict=True)
            for matrix, direction in matrices:
                u, s, v = torch.linalg.svd(direction, full_matrices=False)
                s = s / s.norm().clamp(min=1e-7)  # an expert without tokens has no direction
                for _ in range(5):
                    s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
                matrix.sub_(LR * max(1, matrix.shape[0] / matrix.shape[1]) ** 0.5 * (u * s) @ v)


def muon(parameters: Parameters) -> Optimizer:
    """Ours on ranks, and the plain one in the process that has everything whole."""
    if not dist.is_initialized():
        return PlainMuon(parameters)
    return Muon(parameters.items(), lr=LR, adamw_lr=LR / 4)


def _torch(kind: str, **options: Any) -> Callable[[Parameters], Optimizer]:
    return partial(plain, kind=kind, **options)


FACTORIES: dict[str, Callable[[Parameters], Any]] = {
    "no decay on norms": no_decay_on_norms,
    "groups with schedules": groups_with_schedules,
    "some parameters": some_parameters,
    "adamw fused": fused,
    "adamw foreach": _torch("AdamW", foreach=True, weight_decay=0.1),
    "adam amsgrad": _torch("Adam", amsgrad=True),
    "sgd nesterov": _torch("SGD", momentum=0.9, nesterov=True, weight_decay=0.1),
    "sgd foreach": _torch("SGD", momentum=0.9, dampening=0.1, foreach=True),
    "rmsprop centered": _torch("RMSprop", momentum=0.9, centered=True),
    "adagrad": _torch("Adagrad", lr_decay=0.1),
    "adadelta": _torch("Adadelta"),
    "adamax": _torch("Adamax"),
    "nadam": _torch("NAdam", weight_decay=0.1),
    "radam": _torch("RAdam"),
    "asgd": _torch("ASGD"),
    "muon": muon,
    "lion": partial(lion, foreach=False),
    "lion foreach": partial(lion, foreach=True),
}

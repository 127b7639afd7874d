# SPDX-License-Identifier: Apache-2.0
"""Jobs about optimizers: float32 masters, several optimizers by hand, and optimizers that cannot be right."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_moefold.optim import MasterWeights
from lightning_moefold.parallel import local_part
from lightning_moefold.testing.pieces import Piece, owned_pieces
from tests.exactness.optimizers import FACTORIES
from tests.strategy import finetune
from tests.strategy.finetune import Finetune, Report, make
from tests.strategy.jobs_bad_input import told

MASTER_OPTIONS: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.1, "betas": (0.8, 0.95)}


def drawn_gradient(name: str, shape: tuple[int, ...], step: int) -> Tensor:
    """The whole gradient of a parameter in a step, drawn from its name."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{step} {name}".encode()))
    return torch.randn(shape, generator=generator).bfloat16()


class Drawn(Finetune):
    """Gradients are drawn instead of computed, so that only the optimizer is at work."""

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for name, parameter in self.model.named_parameters():
            layout = self.model.layouts[name]
            whole = drawn_gradient(name, layout.shape, self.trainer.global_step)
            local_part(parameter.grad).copy_(whole[layout.stored_box(self.model.fold, self.model.rank).slices()])

    def configure_optimizers(self) -> Any:
        return MasterWeights(torch.optim.AdamW, self.parameters(), **MASTER_OPTIONS)

    def on_train_end(self) -> None:
        for parameter, state in self.trainer.optimizers[0].state.items():
            assert parameter.dtype == torch.bfloat16
            assert state["master"].dtype == state["exp_avg"].dtype == torch.float32
            assert torch.equal(local_part(parameter), local_part(state["master"]).bfloat16())


def masters(path: str, fold: str, steps: int, folder: str, resume: str | None = None) -> Report:
    """Trains in bfloat16 with float32 masters, and saves after every step."""
    module = Drawn(path)
    run = make(fold, {"max_steps": steps, "precision": "bf16-true"})
    run.fit(module, ckpt_path=resume)
    run.save_checkpoint(Path(folder, f"{steps}.ckpt"))
    return finetune.finish(module, run)


class Named(Finetune):
    """An optimizer by the name that it has in the exactness tests."""

    def configure_optimizers(self) -> Any:
        made = FACTORIES[self.spec["factory"]](dict(self.model.named_parameters()))
        return ([made[0]], [{"scheduler": made[1], "interval": "step"}]) if isinstance(made, tuple) else made


def interrupted(path: str, fold: str, names: list[str], folder: str, steps: int, resume: bool) -> list[Report]:
    """Trains with each optimizer, from the beginning or from the checkpoint after two steps."""
    reports = []
    for name in names:
        module, run = Named(path, factory=name), make(fold, {"max_steps": steps})
        target = Path(folder, f"{name}.ckpt")
        run.fit(module, ckpt_path=str(target) if resume else None)
        if steps == 2:
            run.save_checkpoint(target)
        reports.append(finetune.finish(module, run))
    return reports


class ByHand(Finetune):
    """Experts and the rest have optimizers of their own, which take turns, each with a forward pass of its own."""

    def __init__(self, path: str, **spec: Any) -> None:
        super().__init__(path, **spec)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        experts = [p for n, p in self.named_parameters() if ".experts." in n]
        rest = [p for n, p in self.named_parameters() if ".experts." not in n]
        return [torch.optim.AdamW(experts, lr=5e-3), torch.optim.SGD(rest, lr=0.05, momentum=0.9)]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)  # gradients of the other's parameters are not wanted
            loss = self.model(**batch).loss
            self.manual_backward(loss / 2)
            self.manual_backward(self.model(**batch).loss / 2)
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)
            self.report.losses.append(loss.item())


def by_hand(path: str, fold: str, folder: str, sharding: str, resume: bool) -> tuple[list[float], dict[str, Piece]]:
    """Four batches, two steps each; with a stop after the first two batches if ``resume``."""
    target = Path(folder, "by_hand.ckpt")
    for steps in (4, 8) if resume else (8,):
        module = ByHand(path)
        run = make(fold, {"max_steps": steps}, data_parallel_sharding=sharding)
        run.fit(module, ckpt_path=str(target) if resume and steps == 8 else None)
        if steps == 4:
            run.save_checkpoint(target)
    return module.report.losses, owned_pieces(module.model)


class Combining(torch.optim.SGD):
    """SGD that first looks at a whole parameter in one way or another."""

    how = ""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        p = self.param_groups[0]["params"][-1]
        with torch.no_grad():
            grad = p.grad if p.grad is not None else torch.ones_like(p)
            match self.how:
                case "norm":  # LAMB, LARS
                    p.mul_(1 + 0 * grad.norm())
                case "foreach norm":
                    torch._foreach_norm([local_part(grad)])
                case "mean":  # Adafactor
                    grad.square().mean(-1)
                case "product":  # Muon, Shampoo, on a rank's piece
                    local_part(grad).reshape(-1, 1) @ local_part(grad).reshape(1, -1)
                case "decomposition":  # GaLore
                    torch.linalg.svd(local_part(grad).reshape(-1, 1).double(), full_matrices=False)
        return loss


class Unfit(Finetune):
    def configure_optimizers(self) -> Any:
        kind = type(self.spec["kind"], (Combining,), {"how": self.spec.get("how", "")})
        return kind(self.parameters(), lr=0.1)


def unfit(path: str, fold: str, specs: list[dict[str, str]]) -> list[str]:
    return [told(lambda s=spec: make(fold, {"max_steps": 1}).fit(Unfit(path, **s))) for spec in specs]

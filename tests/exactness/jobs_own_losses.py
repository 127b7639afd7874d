# SPDX-License-Identifier: Apache-2.0
"""Losses of a user's own around a language model; each written once, for a rank of a fold and for one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_moefold import MoECausalLM
from lightning_moefold.testing import Batch
from lightning_moefold.testing.oracle import _hand_over_gradients, _view_parameters
from lightning_moefold.testing.pieces import owned_pieces
from lightning_moefold.testing.reference import hf_reference
from tests.exactness import runs

IGNORED = -100


def log_probabilities(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of each label at the position before it, zero where it is ignored; and which are not."""
    target, real = labels[:, 1:].clamp(min=0), labels[:, 1:] != IGNORED
    return logits[:, :-1].log_softmax(-1).gather(2, target.unsqueeze(2)).squeeze(2) * real, real


def focal(logits: Tensor, labels: Tensor, power: float = 2.0) -> tuple[Tensor, Tensor]:
    logp, real = log_probabilities(logits, labels)
    return (-logp * (1 - logp.exp()) ** power * real).sum(), real.sum()


def preference(logits: Tensor, labels: Tensor, margins: Tensor) -> tuple[Tensor, Tensor]:
    """Like DPO: even rows are chosen, odd ones rejected; ``margins`` are those of a reference model, at the rows of both."""
    logp_B = log_probabilities(logits, labels)[0].sum(1)
    chosen, rejected, margin = logp_B[0::2], logp_B[1::2], margins[0::2]
    return -F.logsigmoid(0.1 * (chosen - rejected - margin)).sum(), torch.tensor(float(len(margin)))


def distillation(logits: Tensor, labels: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    real = labels != IGNORED
    divergence = F.kl_div(logits.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    return (divergence * real).sum(), real.sum()


def _reversed(batch: Batch) -> Batch:
    return {**batch, "input_ids": batch["input_ids"].flip(1)}


class OwnLoss(runs.Case):
    def configure_model(self) -> None:
        super().configure_model()
        if not hasattr(self, "scale"):
            self.scale = nn.Parameter(torch.full((3,), 0.7))
            self.teacher = MoECausalLM.from_pretrained(self.spec["teacher"]) if "teacher" in self.spec else None
            if self.teacher is not None:
                self.teacher.requires_grad_(False)

    def training_step(self, batch: Batch, _: int) -> Tensor:
        loss = getattr(self, "_" + self.spec["loss"])(batch)
        self.run.losses.append(loss.item())
        return loss

    def _focal(self, batch: Batch) -> Tensor:
        return self.model(**batch, loss_fn=focal, power=1.5).loss

    def _preference(self, batch: Batch) -> Tensor:
        margins = batch["input_ids"].double().mean(1)  # an entry for each row, which a pipeline cuts like the batch
        return self.model(**batch, loss_fn=preference, margins=margins).loss

    def _distillation(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            teacher = self.teacher(batch["input_ids"], gather_logits=True).logits
        return self.model(**batch, loss_fn=distillation, teacher=teacher).loss

    def _term(self, batch: Batch) -> Tensor:
        output = self.model(**batch, gather_logits=True)
        return output.loss + (self.scale * output.logits[..., :3]).square().mean()

    def _calls(self, batch: Batch) -> Tensor:
        return self.model(**batch).loss + 0.5 * self.model(**_reversed(batch)).loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.run.grads.append(owned_pieces(self, "grad"))


def train(path: str, fold: str, batches: list[list[Batch]], spec: dict[str, Any]) -> runs.RankRun:
    module = OwnLoss(path, runs.RankRun(), spec)
    runs._fit(module, fold, batches, spec)
    module.run.weights = owned_pieces(module)
    return module.run


def train_alone(path: str, batches: list[list[Batch]], spec: dict[str, Any]) -> runs.RankRun:
    """The oracle: Hugging Face's code in one process on the batches of all data ranks."""
    model = hf_reference(path).train()
    teacher = hf_reference(spec["teacher"]) if "teacher" in spec else None
    scale = nn.Parameter(torch.full((3,), 0.7, dtype=torch.float64))
    parameters = _view_parameters(model, ())
    optimizer = torch.optim.AdamW([*parameters.values(), scale], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    run = runs.RankRun()
    kinds: dict[str, Callable[[list[Batch]], Any]] = {
        "focal": lambda step: _ratio([focal(_logits(model, b), b["labels"], 1.5) for b in step]),
        "preference": lambda step: _ratio(
            [preference(_logits(model, b), b["labels"], b["input_ids"].double().mean(1)) for b in step]
        ),
        "distillation": lambda step: _ratio(
            [distillation(_logits(model, b), b["labels"], _logits(teacher, b).detach()) for b in step]
        ),
        "term": lambda step: [
            _language_loss(model, step) + (scale * _logits(model, b)[..., :3]).square().mean() for b in step
        ],
        "calls": lambda step: _language_loss(model, step) + 0.5 * _language_loss(model, [_reversed(b) for b in step]),
    }
    for step in batches:
        model.zero_grad()
        scale.grad = None
        loss = kinds[spec["loss"]](step)
        loss = torch.stack(loss) if isinstance(loss, list) else loss.expand(len(step))
        run.losses.append(loss.tolist())
        loss.mean().backward()
        _hand_over_gradients(model, parameters)
        everything = {f"model.{n}": p for n, p in parameters.items()} | (
            {"scale": scale} if scale.grad is not None else {}
        )
        run.grads.append({n: p.grad.clone() for n, p in everything.items()})
        torch.nn.utils.clip_grad_norm_(list(everything.values()), 0.5)
        optimizer.step()
    run.weights = {f"model.{n}": p.detach().clone() for n, p in parameters.items()} | {"scale": scale.detach()}
    return run


def _logits(model: Any, batch: Batch) -> Tensor:
    return model(input_ids=batch["input_ids"], use_cache=False).logits


def _ratio(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    return sum(total for total, _ in parts) / sum(weight for _, weight in parts)


def _language_loss(model: Any, step: list[Batch]) -> Tensor:
    parts = [log_probabilities(_logits(model, b), b["labels"]) for b in step]
    return _ratio([(-logp.sum(), real.sum()) for logp, real in parts])

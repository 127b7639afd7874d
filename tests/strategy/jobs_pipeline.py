# SPDX-License-Identifier: Apache-2.0
"""Jobs under a pipeline: errors on some ranks, and what a call of the model leaves behind."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor

from lightning_moefold import Fold, MoECausalLM, MoEFoldStrategy
from lightning_moefold.mesh import FoldedMesh
from lightning_moefold.models.weights import CheckpointWeights, deferred_weights
from lightning_moefold.parallel import PipelinePlan, Settings, local_part, parallelize
from tests.strategy import finetune
from tests.strategy.finetune import Finetune
from tests.strategy.jobs_bad_input import told
from tests.strategy.plain_modules import trainer


def _make(path: str, fold: str, plan: PipelinePlan | None = None) -> MoECausalLM:
    mesh = FoldedMesh(Fold.parse(fold, dist.get_world_size()), "cpu")
    with deferred_weights():
        model = MoECausalLM.from_pretrained(path, output_router_logits=True)
    parallelize(model, mesh, Settings(plan=plan or PipelinePlan(), num_microbatches=2), torch.device("cpu"))
    return model


def _fails(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    raise ZeroDivisionError


def errors(path: str) -> dict[str, str]:
    model, tokens = _make(path, "pp2 | ep2"), finetune.rows(4)
    assert model.mesh is not None
    dp, last = model.mesh.place["dp"], model.mesh.place["pp"] == 1
    bad = tokens.clone()
    bad[1, 2] = 96 if dp == 1 else bad[1, 2]

    def call(input_ids: Tensor, labels: Tensor | None = None, **more: Any) -> Tensor:
        output = model(input_ids, labels=input_ids if labels is None else labels, **more)
        return output.logits.sum() if more.get("gather_logits") else output.loss

    return {
        "bad token": told(lambda: call(bad)),
        "other batch on the last stage": told(lambda: call((tokens + last) % 96)),
        "other arguments on the last stage": told(lambda: call(tokens, **({"gather_logits": True} if last else {}))),
        "loss_fn": told(lambda: call(tokens, loss_fn=_fails)),
        "through logits": told(lambda: call(tokens, gather_logits=True).backward()),
        "generate": told(lambda: model.generate(tokens)),
        "good again": told(lambda: call(tokens).backward()),
    }


def names_read(path: str) -> set[str]:
    names: set[str] = set()
    original = CheckpointWeights.fill

    def fill(self: CheckpointWeights, name: str, box: Any, out: Tensor) -> None:
        names.add(name)
        original(self, name, box, out)

    CheckpointWeights.fill = fill  # type: ignore[method-assign]
    try:
        _make(path, "pp2")
    finally:
        CheckpointWeights.fill = original  # type: ignore[method-assign]
    return names


def a_call(path: str) -> dict[str, Any]:
    model, tokens = _make(path, "pp2"), finetune.rows(8)
    before = {name: torch.full_like(p, 3.0) for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.grad = before[name]
    output = model(tokens, labels=tokens, gather_logits=True)
    kept = all(p.grad is before[name] and bool((p.grad == 3.0).all()) for name, p in model.named_parameters())
    model.eval()
    mine = model(tokens).logits  # gradients are on, but there are no labels
    return {
        "grads_kept": kept,
        "counts": [int(layer.load_E.sum()) for layer in model.moe_layers().values()],
        "loss": output.loss.item(),
        "logits": output.logits.tolist(),
        "own_logits": None if mine is None else list(mine.shape),
    }


def evaluations(path: str, fold: str, plans: list[PipelinePlan]) -> list[tuple[float, Tensor]]:
    """Loss and logits without gradients; two batches of other lengths."""
    seen = []
    for plan in plans:
        model = _make(path, fold, plan).double()
        for length in (6, 3):
            tokens = finetune.rows(5)[:, :length]
            with torch.no_grad():
                output = model(tokens, labels=tokens, gather_logits=True)
            seen.append((output.loss.item(), output.logits))
    return seen


def after_inference_mode(path: str, fold: str) -> list[tuple[float, dict[str, Tensor]]]:
    """Loss and gradients of a call, alone and after one in inference mode."""
    seen = []
    for before in (False, True):
        model, tokens = _make(path, fold), finetune.rows(4)
        if before:
            with torch.inference_mode():
                assert not model(tokens, labels=tokens).loss.requires_grad
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        seen.append((loss.item(), {n: local_part(p.grad) for n, p in model.named_parameters() if p.grad is not None}))
        model.release_gathered_weights()
    return seen


class _Alias(Finetune):
    def configure_model(self) -> None:
        super().configure_model()
        self.norm, self.embedding = self.model.model.norm, self.model.model.embed_tokens


def refused(path: str, tied: str) -> dict[str, str]:
    def fit(module: pl.LightningModule, microbatches: int | None = 4, **options: Any) -> None:
        strategy = MoEFoldStrategy(fold="pp2", num_microbatches=microbatches, **options)
        trainer(strategy, max_steps=1, precision="64-true").fit(module)

    return {
        "plain module": told(lambda: fit(BoringModel())),
        "second name": told(lambda: fit(_Alias(path))),
        "tied": told(lambda: fit(Finetune(tied), pipeline_schedule="zbv")),
        "microbatches": told(lambda: fit(Finetune(path), None)),
    }

# SPDX-License-Identifier: Apache-2.0
"""Training in one process with Hugging Face's code: the losses, gradients and weights a parallel run must reproduce.

Shapes: E experts, F expert ffn width, H hidden size, R rows, L positions, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_moefold.errors import InputError
from lightning_moefold.testing.batches import IGNORE, Batch, GlobalBatch, micro_batches, unpack_documents
from lightning_moefold.testing.dropping import DroppingReference
from lightning_moefold.testing.reference import hf_reference

_FUSED = ".experts.gate_up_proj"

#: Makes an optimizer, or an optimizer and a scheduler that steps after it, for the trained parameters by name.
OptimizerFactory = Callable[
    [Mapping[str, nn.Parameter]],
    torch.optim.Optimizer | tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler],
]


@dataclasses.dataclass(frozen=True)
class ReferenceRun:
    """The results of a run in one process, by the names of parameters in the model (see :func:`canonical`).

    Attributes:
        losses: Loss of each batch, auxiliary loss included.
        grads: For each optimizer step, the accumulated gradients before clipping; None for frozen parameters.
        grad_norms: For each optimizer step, the 2-norm over all gradients before clipping.
        weights: The weights after the last step.
    """

    losses: list[float]
    grads: list[dict[str, Tensor | None]]
    grad_norms: list[float]
    weights: dict[str, Tensor]


def reference_run(
    path: str | Path,
    batches: Sequence[GlobalBatch],
    *,
    dtype: torch.dtype = torch.float64,
    steps: int | None = None,
    lr: float = 1e-2,
    optimizer: Literal["adamw", "sgd"] | OptimizerFactory = "adamw",
    clip: float | None = None,
    accumulate: int = 1,
    config_overrides: Mapping[str, Any] | None = None,
    frozen: Iterable[str] = (),
    num_microbatches: int = 1,
    capacity: tuple[float, Literal["probs", "position"]] | None = None,
    adapter: str | Path | None = None,
) -> ReferenceRun:
    """Trains a checkpoint in one process on the batches of all data ranks.

    The loss of a batch is the mean over its label tokens on all ranks (``sum(w * l) / sum(w)`` with
    ``loss_weights``, where ``w`` of a position goes with its label), 0 if there are none; plus, with
    ``output_router_logits=True``, the config's coefficient times the mean over micro-batches with a token that counts of
    Hugging Face's load-balancing loss. With ``document_ids`` each document is on its own.

    Args:
        path: Folder of the checkpoint.
        batches: Each either the rows of all data ranks in rank order, or a list of one batch per data rank.
        dtype: Data type of weights and computation.
        steps: Number of optimizer steps; None for as many as the batches allow.
        lr: Learning rate.
        optimizer: ``"adamw"`` (betas 0.9 and 0.95, weight decay 0.1), ``"sgd"`` (momentum 0.9), or a function that
            makes one from the trained parameters by name (``lr`` is then its own).
        clip: Largest gradient norm, or None.
        accumulate: Batches per step; their losses are averaged.
        config_overrides: Fields of the config to replace.
        frozen: Patterns (``fnmatch``) on our parameter names.
        num_microbatches: Micro-batches per batch; more than one needs one batch per data rank.
        capacity: Capacity factor and drop policy, where experts drop tokens.
        adapter: Directory of an adapter, which PEFT adds to the model and which alone is trained.

    Returns:
        The record of the run.

    Raises:
        ValueError: If there are too few batches or rows, rows differ in length, or a pattern matches no parameter.
    """
    steps = len(batches) // accumulate if steps is None else steps
    if steps < 1 or steps * accumulate > len(batches):
        raise InputError(f"{steps} steps of {accumulate} batches need more than the {len(batches)} given")
    model = hf_reference(path, dtype=dtype, **(config_overrides or {})).train()
    if capacity is not None:
        DroppingReference(model, *capacity)
    if adapter is not None:
        from peft import PeftModel

        PeftModel.from_pretrained(model, adapter, is_trainable=True)  # changes the model itself
        model.train()
    coefficient = model.router_aux_loss_coef
    parameters = _view_parameters(model, frozen)
    update, scheduler = _make_optimizer(optimizer, {n: p for n, p in parameters.items() if p.requires_grad}, lr)
    losses: list[float] = []
    grads: list[dict[str, Tensor | None]] = []
    norms: list[float] = []
    for step in range(steps):
        model.zero_grad()
        for batch in batches[step * accumulate : (step + 1) * accumulate]:
            parts = micro_batches(batch, num_microbatches)
            model.router_aux_loss_coef = coefficient / max(len(parts), 1)  # losses add up, auxiliary losses average
            losses.append(_backward(model, parts, 1 / accumulate))
        _hand_over_gradients(model, parameters)
        grads.append({name: _copy(parameter.grad) for name, parameter in parameters.items()})
        norms.append(_clip(update, clip))
        update.step()
        if scheduler is not None:
            scheduler.step()
    weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    return ReferenceRun(losses, grads, norms, weights)


def canonical(named_tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Translates ``transformers``' in-memory names into ours.

    The fused ``...experts.gate_up_proj`` ``[E, 2F, H]`` becomes ``...experts.gate_proj`` and ``...experts.up_proj``
    (both ``[E, F, H]``); every other name, ``...experts.down_proj`` ``[E, H, F]`` included, stays.

    Args:
        named_tensors: Tensors by name, such as ``model.state_dict()`` or ``model.named_parameters()``.

    Returns:
        By our names; the split tensors are views.
    """
    items = named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors
    return {new: tensor for name, whole in items for new, tensor in _split(name, whole)}


def routing_margin(model: Any, batch: Batch) -> float:
    """Measures how far a batch is from a different choice of experts.

    Args:
        model: A model of :func:`~lightning_moefold.testing.reference.hf_reference`.
        batch: The rows of all data ranks, without ``document_ids``.

    Returns:
        The smallest difference between the k-th and the (k+1)-th router logit over all tokens and layers; infinity if
        every expert is always chosen. Where it is small, rounding alone may change the experts of a token.
    """
    inputs = {key: value for key, value in batch.items() if key in ("input_ids", "attention_mask", "position_ids")}
    with torch.no_grad():
        logits_by_layer = model(**inputs, output_router_logits=True, use_cache=False).router_logits
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool().flatten()
    k, margin = model.config.num_experts_per_tok, float("inf")
    for logits in logits_by_layer:
        if logits.shape[1] > k:
            top = logits[real].topk(k + 1).values
            margin = min(margin, float((top[:, k - 1] - top[:, k]).min()))
    return margin


def _split(name: str, tensor: Tensor, experts: int = 0) -> Iterator[tuple[str, Tensor]]:
    if ".lora_" in name:
        yield from _split_adapter(name, tensor, experts)
        return
    name = name.replace(".base_layer", "")
    if name.endswith(_FUSED):
        stem = name.removesuffix("gate_up_proj")
        gate, up = tensor.chunk(2, dim=1)
        yield f"{stem}gate_proj", gate
        yield f"{stem}up_proj", up
    else:
        yield name, tensor


def _split_adapter(name: str, tensor: Tensor, experts: int) -> Iterator[tuple[str, Tensor]]:
    """PEFT's A and B by our names; the second wrapper of a layer's experts is that of ``down_proj``."""
    owner, _, part = name.removesuffix(".default.weight").rpartition(".")
    stem = owner.replace(".base_layer", "")
    if not stem.endswith(".experts"):
        yield f"{stem}.{part.replace('magnitude_vector', 'magnitude')}", tensor
        return
    matrix = "gate_up" if owner.endswith(".base_layer") else "down"
    if part == "lora_A":
        yield f"{stem}.{matrix}_lora_A", tensor.view(experts, -1, tensor.shape[1])
        return
    b_EOR = tensor.view(tensor.shape[0], -1, experts).permute(2, 0, 1)
    if matrix == "down":
        yield f"{stem}.down_lora_B", b_EOR
    else:
        gate, up = b_EOR.chunk(2, dim=1)
        yield f"{stem}.gate_lora_B", gate
        yield f"{stem}.up_lora_B", up


def _view_parameters(model: Any, frozen: Iterable[str]) -> dict[str, nn.Parameter]:
    """Makes parameters of our names that share the model's memory: an optimizer step on them moves the model.

    So either half of the fused expert weights can be frozen alone.
    """
    patterns, experts = list(frozen), model.num_experts
    adapted = any(".lora_" in name for name, _ in model.named_parameters())
    views: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        for new, tensor in _split(name, parameter.detach(), experts):
            fixed = any(fnmatchcase(new, pattern) for pattern in patterns) or (adapted and ".lora_" not in name)
            views[new] = nn.Parameter(tensor, requires_grad=not fixed)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in views):
            raise InputError(f"frozen pattern {pattern!r} matches no parameter")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(views[new].requires_grad for new, _ in _split(name, parameter.detach(), experts)))
    return views


def _hand_over_gradients(model: Any, parameters: Mapping[str, nn.Parameter]) -> None:
    """Copies the model's gradients to the views; a parameter the batch did not reach has gradient zero."""
    for name, parameter in model.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for new, tensor in _split(name, grad, model.num_experts):
            parameters[new].grad = tensor.clone() if parameters[new].requires_grad else None


def _make_optimizer(
    kind: str | OptimizerFactory, parameters: Mapping[str, nn.Parameter], lr: float
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler | None]:
    if callable(kind):
        made = kind(parameters)
        return made if isinstance(made, tuple) else (made, None)
    if kind == "adamw":
        return torch.optim.AdamW(parameters.values(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1), None
    if kind == "sgd":
        return torch.optim.SGD(parameters.values(), lr=lr, momentum=0.9), None
    raise InputError(f"unknown optimizer {kind!r}: choose 'adamw' or 'sgd', or give a function")


def _backward(model: Any, batches: Sequence[Batch], scale: float) -> float:
    """Adds ``scale`` times the gradient of a batch's loss to the model, micro-batch by micro-batch.

    Returns:
        The loss, unscaled.
    """
    batches = [unpack_documents(batch) if "document_ids" in batch else batch for batch in batches]
    # Without any label token the sum below is zero whatever it is divided by.
    tokens = sum(_label_weight(batch) for batch in batches) or 1
    total = 0.0
    for batch in batches:
        loss = _loss(model, batch, tokens)
        if loss.requires_grad:
            (scale * loss).backward()
        total += float(loss.detach())
    return total


def _loss(model: Any, batch: Batch, tokens: float) -> Tensor:
    """Computes a micro-batch's share of the loss with Hugging Face's ``forward``, shape ``[]``."""
    inputs = {key: value for key, value in batch.items() if key != "loss_weights"}
    stock = model.loss_function
    try:
        if "loss_weights" in batch:
            model.loss_function = partial(_weighted_loss, weights_RL=batch["loss_weights"])
        # A cache would switch off transformers' handling of packed position_ids, which silently looks across borders.
        loss = model(**inputs, num_items_in_batch=tokens, use_cache=False).loss
    finally:
        model.loss_function = stock
    assert isinstance(loss, Tensor)
    return loss


def _label_weight(batch: Batch) -> float:
    """Counts the label tokens of a batch after the shift, or sums their weights."""
    real = batch["labels"][:, 1:] != IGNORE
    if "loss_weights" in batch:
        return float(batch["loss_weights"][:, 1:].double()[real].sum())
    return int(real.sum())


def _weighted_loss(
    logits_RLV: Tensor, labels_RL: Tensor, vocab_size: int, *, weights_RL: Tensor, num_items_in_batch: float, **_: Any
) -> Tensor:
    """Replaces Hugging Face's loss where its tokens have weights."""
    logits = logits_RLV[:, :-1].reshape(-1, vocab_size).to(torch.promote_types(logits_RLV.dtype, torch.float32))
    losses = nn.functional.cross_entropy(logits, labels_RL[:, 1:].flatten(), ignore_index=IGNORE, reduction="none")
    return (losses * weights_RL[:, 1:].flatten().to(losses.dtype)).sum() / num_items_in_batch


def _clip(optimizer: torch.optim.Optimizer, largest: float | None) -> float:
    """Scales the gradients of an optimizer's parameters to a norm of at most ``largest``, as Lightning does.

    Returns:
        The norm before.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return float(nn.utils.clip_grad_norm_(parameters, math.inf if largest is None else largest))


def _copy(grad: Tensor | None) -> Tensor | None:
    return None if grad is None else grad.clone()

# SPDX-License-Identifier: Apache-2.0
"""One decoder layer of two large models: ours, Hugging Face's, a dense one, and the products alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gpu_parts.clock import Call, Contender, kernels_of, peak_flops, take_turns
from gpu_parts.record import Context, free_memory
from gpu_parts.shapes import (
    MODELS,
    hugging_face_layer,
    layer_config,
    layer_flops,
    our_layer,
    products,
    tokens_of,
)
from lightning_moefold.models.config import MoEConfig
from lightning_moefold.modules import Attention, DecoderLayer
from lightning_moefold.modules.sequence import SequenceBatch

_TABLE = "one decoder layer, forward and backward, bfloat16, one row"


def run(ctx: Context) -> None:
    """The part: both models first, then both compiled, which takes long."""
    for name in MODELS:
        _guarded(ctx, f"{name}", partial(_compare, ctx, name))
    for name in MODELS[: ctx.pick(2, 1)]:
        _guarded(ctx, f"{name}, compiled", partial(_compiled, ctx, name))


def _guarded(ctx: Context, name: str, function: Callable[[], None]) -> None:
    """What fails before anything is timed is written down, and the next goes on."""
    try:
        function()
    except Exception as error:
        ctx.record.fail_try(name, error)
    free_memory()


def step_of(layer: nn.Module, x: Tensor, grad: Tensor, batch: SequenceBatch) -> tuple[Call, Callable[[], None]]:
    """A forward and backward of our layer as in a model, which describes a batch once, and what clears its gradients."""

    def call(mark: Callable[[], None]) -> None:
        y_TD = layer(x.flatten(0, 1), batch)
        mark()
        y_TD.backward(grad.flatten(0, 1))

    return call, partial(clear, layer, x)


def clear(module: nn.Module, x: Tensor) -> None:
    """Drops gradients."""
    module.zero_grad(set_to_none=True)
    x.grad = None


def make_input(ctx: Context, hidden: int) -> tuple[Tensor, Tensor]:
    """Hidden states that ask for gradients, and the gradient of the output, ``[1, S, D]``."""
    shape = 1, tokens_of(ctx), hidden
    x, grad = (torch.randn(shape, device=ctx.device, dtype=torch.bfloat16) for _ in range(2))
    return x.requires_grad_(), grad


def _cells(ctx: Context, flops: float) -> Callable[[float], dict[str, Any]]:
    peak = peak_flops(ctx.device)
    return lambda ms: {"TFLOP/s": flops / ms / 1e9, "MFU": flops / ms * 1e3 / peak}


def _ours(ctx: Context, layer: nn.Module, x: Tensor, grad: Tensor, flops: float, name: str, **more: Any) -> Contender:
    attention = layer.self_attn
    assert isinstance(attention, Attention)  # in what is compiled, too
    call, drop = step_of(layer, x, grad, attention.batch_of(x))
    return Contender(name, call, drop, _cells(ctx, flops), **more)


def _compare(ctx: Context, name: str) -> None:
    config = layer_config(ctx, name)
    flops = layer_flops(config, tokens_of(ctx))
    x, grad = make_input(ctx, config.hidden_size)
    ours, dense = our_layer(ctx, config), our_layer(ctx, config, dense=True)
    contenders = [_ours(ctx, ours, x, grad, flops, "moefold")]
    try:
        theirs = hugging_face_layer(ctx, config, ours, x)
    except Exception as error:
        ctx.record.fail_try(f"{name} / Hugging Face's layer", error)
    else:
        for experts, label in (("grouped_mm", "HF grouped_mm"), ("eager", "HF eager")):
            call = partial(_their_step, theirs, experts, x, grad)
            contenders.append(Contender(label, call, partial(clear, theirs.layer, x), _cells(ctx, flops)))
        if theirs.shares_weights:
            ctx.record.attempt("agreement with Hugging Face's layer, ||a - b|| / ||b||", name,
                               lambda: _agreement(ours, theirs, x, grad))  # fmt: skip
    contenders.append(_ours(ctx, dense, x, grad, flops, "dense layer of equal FLOPs"))
    contenders.append(_products_alone(ctx, config))
    take_turns(ctx, _TABLE, contenders, versus="HF grouped_mm", model=name)
    ctx.record.attempt(f"kernels of {name}, by time", "profile", lambda: _kernels(ctx, name, ours, x, grad))


def _their_step(theirs: Any, experts: str, x: Tensor, grad: Tensor, mark: Callable[[], None]) -> None:
    y = theirs(x, experts)
    mark()
    y.backward(grad)


def _agreement(ours: DecoderLayer, theirs: Any, x: Tensor, grad: Tensor) -> dict[str, float]:
    found = []
    for function in (ours, lambda x: theirs(x, "grouped_mm")):
        y = function(x)
        (grad_x,) = torch.autograd.grad(y, x, grad)
        found.append((y.detach().float(), grad_x.float()))
    (a, da), (b, db) = found
    return {"output": float((a - b).norm() / b.norm()), "gradient of the input": float((da - db).norm() / db.norm())}


def _products_alone(ctx: Context, config: MoEConfig) -> Contender:
    """Each product of forward and its two of backward, as dense ones. Operands are shared where shapes allow."""
    operands = []
    for rows, inputs, outputs in products(config, tokens_of(ctx)):
        x, w, y = (
            torch.randn(shape, device=ctx.device, dtype=torch.bfloat16)
            for shape in ((rows, inputs), (outputs, inputs), (rows, outputs))
        )
        operands.append((x, w, y))

    def call(mark: Callable[[], None]) -> None:
        for x, w, _ in operands:
            torch.mm(x, w.t())
        mark()
        for x, w, y in operands:
            torch.mm(y, w)
            torch.mm(y.t(), x)

    flops = sum(6.0 * x.shape[0] * w.numel() for x, w, _ in operands)
    return Contender("products alone", call, cells=_cells(ctx, flops))


def _kernels(ctx: Context, name: str, layer: DecoderLayer, x: Tensor, grad: Tensor) -> dict[str, Any]:
    call, drop = step_of(layer, x, grad, layer.self_attn.batch_of(x))
    try:
        rows = kernels_of(ctx, lambda: call(lambda: None))
    finally:
        drop()
    ctx.record.detail(f"kernels of {name}", rows[:40])
    total = sum(row["ms"] for row in rows)
    for row in rows[:15]:
        ctx.record.row(f"kernels of {name}, by time", what=row["kernel"][:70], ms=row["ms"], count=row["count"],
                       share=row["ms"] / total)  # fmt: skip
    return {"ms": total, "count": sum(row["count"] for row in rows), "share": 1.0}


def _compiled(ctx: Context, name: str) -> None:
    config = layer_config(ctx, name)
    flops = layer_flops(config, tokens_of(ctx))
    x, grad = make_input(ctx, config.hidden_size)
    layer, compiled = our_layer(ctx, config), our_layer(ctx, config)
    compiled.compile(backend=ctx.pick("inductor", "eager"))
    take_turns(ctx, _TABLE, [
        _ours(ctx, compiled, x, grad, flops, "moefold, compiled", limit=75),
        _ours(ctx, layer, x, grad, flops, "moefold, once more"),
    ], model=name)  # fmt: skip
    torch._dynamo.reset()

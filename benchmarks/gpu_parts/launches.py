# SPDX-License-Identifier: Apache-2.0
"""What the host does: kernels that it launches, times that it waits for the device, memory that it asks for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from gpu_parts.clock import host_waits, kernels_of
from gpu_parts.layers import clear, make_input, step_of
from gpu_parts.record import Context, free_memory, synchronize
from gpu_parts.shapes import MODELS, layer_config, our_layer
from lightning_moefold import MoECausalLM


def run(ctx: Context) -> None:
    """The part."""
    for name in MODELS:
        ctx.record.attempt("kernels launched", f"layer of {name}", partial(_layer, ctx, name))
        free_memory()
    ctx.record.attempt("kernels launched", "step of a model of 2 layers", partial(_model, ctx))


def _count(ctx: Context, forward: Callable[[], Any], step: Callable[[], Any]) -> dict[str, Any]:
    kernels, whole = kernels_of(ctx, forward), kernels_of(ctx, step)
    first, both = (sum(row["count"] for row in rows) for rows in (kernels, whole))
    found: dict[str, Any] = {"forward": first, "backward": both - first}
    if ctx.on_gpu:
        waits = host_waits(ctx, step)
        places = "; ".join(f"{place} x{count}" for place, count in Counter(waits).most_common(4))
        found |= {"waits of the host": len(waits), "where": places[:200]}
        synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()
        step()
        synchronize()
        after = torch.cuda.memory_stats()
        found |= {
            "peak allocated GB": after["allocated_bytes.all.peak"] / 1e9,
            "peak reserved GB": after["reserved_bytes.all.peak"] / 1e9,
            "allocations": after["allocation.all.allocated"] - before["allocation.all.allocated"],
            "retries": after["num_alloc_retries"] - before["num_alloc_retries"],
        }
    return found


def _layer(ctx: Context, name: str) -> dict[str, Any]:
    config = layer_config(ctx, name)
    layer = our_layer(ctx, config)
    x, grad = make_input(ctx, config.hidden_size)
    batch = layer.self_attn.batch_of(x)
    call, drop = step_of(layer, x, grad, batch)

    def forward() -> None:
        layer(x.flatten(0, 1), batch)

    def step() -> None:
        call(lambda: None)
        drop()

    try:
        return _count(ctx, forward, step)
    finally:
        clear(layer, x)


def _model(ctx: Context) -> dict[str, Any]:
    config = replace(
        layer_config(ctx, "qwen2-57b-a14b"),
        num_hidden_layers=2,
        sliding_windows=(None, None),
        vocab_size=ctx.pick(32000, 96),
    )
    config = replace(config, hidden_size=ctx.pick(2048, 64), moe_intermediate_size=ctx.pick(1024, 32),
                     shared_expert_intermediate_size=ctx.pick(4096, 64), num_attention_heads=ctx.pick(16, 4))  # fmt: skip
    with torch.device(ctx.device):
        model = MoECausalLM(config)
    model = model.to(ctx.device, torch.bfloat16).train()
    token = torch.randint(config.vocab_size, (2, ctx.pick(2048, 32)), device=ctx.device)

    def forward() -> None:
        model(token, labels=token)

    def step() -> None:
        model(token, labels=token).loss.backward()
        model.zero_grad(set_to_none=True)

    return _count(ctx, forward, step)

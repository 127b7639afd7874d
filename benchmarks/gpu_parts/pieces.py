# SPDX-License-Identifier: Apache-2.0
"""The pieces of a layer by themselves, each in several ways."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from gpu_parts.clock import median_ms
from gpu_parts.record import Context, free_memory
from gpu_parts.shapes import MODELS, layer_config, tokens_of
from lightning_moefold.models.config import MoEConfig
from lightning_moefold.modules import Experts, MoELayer, RMSNorm, RouterOptions, logit_chunks
from lightning_moefold.modules.attention.rotary import rotary_tables
from lightning_moefold.modules.experts.float8_products import Float8Products, to_float8
from lightning_moefold.modules.experts.products import ExpertProducts
from lightning_moefold.modules.vocabulary import VocabularyHead

Step = Callable[[], Any]


def run(ctx: Context) -> None:
    """The part."""
    for kind in (
        _grouped_products,
        _sums,
        _attention,
        _norms,
        _activations,
        _sorting,
        _moe_layers,
        _cross_entropy,
        _rotary,
        _compiled,
    ):
        try:
            kind(ctx)
        except Exception as error:
            ctx.record.fail_try(kind.__name__.strip("_"), error)
        free_memory()


def _ours(module: str, name: str) -> Any:
    """A function of the project, or None where it has none of that name."""
    try:
        return getattr(importlib.import_module(f"lightning_moefold.{module}"), name, None)
    except ImportError:
        return None


def _random(ctx: Context, *shape: int, grad: bool = False) -> Tensor:
    return torch.randn(shape, device=ctx.device, dtype=torch.bfloat16).mul_(0.1).requires_grad_(grad)


def _time(
    ctx: Context, table: str, name: str, step: Step, *, flops: float = 0, moved: float = 0, **labels: Any
) -> None:
    """A row with the median, and the rate of FLOPs or bytes."""

    def measure() -> dict[str, Any]:
        ms = median_ms(ctx, step)
        cells: dict[str, Any] = {"ms": ms}
        if flops:
            cells["TFLOP/s"] = flops / ms / 1e9
        if moved:
            cells["GB/s"] = moved / ms / 1e6
        return cells

    ctx.record.attempt(table, name, measure, limit=40, **labels)


def _both_ways(function: Callable[..., Tensor], inputs: list[Tensor]) -> Step:
    """Forward and backward; the output's gradient is made once."""
    grad: list[Tensor] = []

    def step() -> None:
        y = function(*inputs)
        if not grad:
            grad.append(torch.randn_like(y))
        torch.autograd.grad(y, [x for x in inputs if x.requires_grad], grad[0])

    return step


def _choices(ctx: Context, config: MoEConfig) -> Tensor:
    """Experts of each token, somewhat uneven, ``[T, K]``."""
    taste_E = torch.randn(config.num_experts, device=ctx.device) * 0.3
    score_TE = torch.randn(tokens_of(ctx), config.num_experts, device=ctx.device) + taste_E
    return score_TE.topk(config.num_experts_per_tok).indices


def _grouped_products(ctx: Context) -> None:
    table = "grouped products of gate and up, and of down; products of equal FLOPs in one piece"
    for name in MODELS:
        config = layer_config(ctx, name)
        count_E = _choices(ctx, config).flatten().bincount(minlength=config.num_experts)
        ends_E = count_E.cumsum(0).to(torch.int32)
        rows, experts = int(count_E.sum()), config.num_experts
        for label, inner, outer in (
            ("gate and up", config.hidden_size, 2 * config.moe_intermediate_size),
            ("down", config.moe_intermediate_size, config.hidden_size),
        ):
            x, w, y = _random(ctx, rows, inner), _random(ctx, experts, outer, inner), _random(ctx, rows, outer)
            flops = 2.0 * rows * inner * outer
            add = partial(_time, ctx, table, flops=flops, model=name, product=label)
            add("grouped_mm forward", partial(_forward, x, w, ends_E))
            add("grouped_mm gradient of rows", partial(F.grouped_mm, y, w, offs=ends_E))
            add("grouped_mm gradient of weights", partial(F.grouped_mm, y.t(), x, offs=ends_E))
            alone = ExpertProducts(count_E.tolist())
            add("expert by expert, forward", partial(alone.forward, x, w))
            add("expert by expert, gradient of rows", partial(alone.input_gradient, y, w))
            add("expert by expert, gradient of weights", partial(alone.weight_gradient, y, x, w))
            eight = Float8Products(count_E)
            add("fp8 forward, both factors rounded", _in_float8(ctx, partial(eight.forward, x, w)))
            add("fp8 gradient of rows, both factors rounded", _in_float8(ctx, partial(eight.input_gradient, y, w)))
            for way, stack in (("along", w), ("across", w.transpose(1, 2))):
                _time(ctx, table, f"fp8: rounding the weights {way} their rows", partial(to_float8, stack), moved=5.0 * w.numel(),
                      model=name, product=label)  # fmt: skip
            add("mm forward", partial(torch.mm, x, w[0].t()))
            add("mm gradient of weights", partial(torch.mm, y.t(), x))
            del x, w, y, add, alone, stack
            free_memory()


def _in_float8(ctx: Context, step: Step) -> Step:
    def call() -> Any:
        ctx.needs_float8()
        return step()

    return call


def _forward(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(x, w.transpose(1, 2), offs=ends)


def _sums(ctx: Context) -> None:
    table = "sum of each token's rows (bytes: rows read, tokens written)"
    for name in MODELS:
        config = layer_config(ctx, name)
        expert_TK = _choices(ctx, config)
        tokens, k = expert_TK.shape
        slot_M = expert_TK.flatten().argsort(stable=True)
        token_M = slot_M // k
        row_M = torch.empty_like(slot_M)
        row_M[slot_M] = torch.arange(len(slot_M), device=ctx.device)
        y_MD = _random(ctx, tokens * k, config.hidden_size)
        add = partial(_time, ctx, table, moved=2.0 * (tokens * k + tokens) * config.hidden_size, model=name)

        def atomics(dtype: torch.dtype, y_MD: Tensor = y_MD, tokens: int = tokens, token_M: Tensor = token_M) -> Tensor:
            return (
                y_MD.new_zeros(tokens, y_MD.shape[1], dtype=dtype).index_add_(0, token_M, y_MD.to(dtype)).to(y_MD.dtype)
            )

        add("index_add_ in float32", partial(atomics, torch.float32))
        add("index_add_ in bfloat16", partial(atomics, torch.bfloat16))
        add(
            "inverse permutation and sum",
            partial(_gathered_sum, y_MD, row_M, k),
        )
        if total := _ours("kernels", "sum_of_copies"):
            add("moefold", partial(total, y_MD, row_M.view(tokens, k), True))
        add("gather of rows alone", partial(torch.index_select, y_MD, 0, row_M))


def _gathered_sum(y_MD: Tensor, row_M: Tensor, k: int) -> Tensor:
    return y_MD.index_select(0, row_M).view(-1, k, y_MD.shape[1]).sum(1)


def _rotary(ctx: Context) -> None:
    table = "rotary positions of the query heads, forward and backward (bytes: 4 passes)"
    for name in MODELS:
        config = layer_config(ctx, name)
        x = _random(ctx, 1, tokens_of(ctx), config.num_attention_heads, config.head_dim, grad=True)
        place_BS = torch.arange(tokens_of(ctx), device=ctx.device)[None]
        cos, sin = rotary_tables(place_BS, config.head_dim, config.rope_theta, torch.bfloat16)
        for label, place in (("moefold", "kernels"), ("moefold, by operators", "modules.rotary")):
            if rotate := _ours(place, "rotate"):
                step = _both_ways(lambda x, f=rotate, c=cos, s=sin: f(x, c, s), [x])
                _time(ctx, table, label, step, moved=4.0 * x.nbytes, model=name)


def _norms(ctx: Context) -> None:
    table = "RMSNorm, forward and backward (bytes: 5 passes over the rows)"
    for name in MODELS:
        hidden = layer_config(ctx, name).hidden_size
        x, weight = _random(ctx, tokens_of(ctx), hidden, grad=True), _random(ctx, hidden, grad=True)
        ours = RMSNorm(hidden).to(ctx.device, torch.bfloat16)
        add = partial(_time, ctx, table, moved=5.0 * x.nbytes, model=name)
        add("moefold", _both_ways(lambda x, w, m=ours: m(x), [x, ours.weight]))
        add("F.rms_norm", _both_ways(lambda x, w, h=hidden: F.rms_norm(x, (h,), w, 1e-6), [x, weight]))
        add("in steps, as transformers", _both_ways(_plain_norm, [x, weight]))


def _plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _activations(ctx: Context) -> None:
    table = "SwiGLU of the experts' rows, forward and backward (bytes: 8 passes)"
    for name in MODELS:
        config = layer_config(ctx, name)
        shape = tokens_of(ctx) * config.num_experts_per_tok, config.moe_intermediate_size
        gate, up = _random(ctx, *shape, grad=True), _random(ctx, *shape, grad=True)
        weight = torch.rand(shape[0], device=ctx.device).requires_grad_()
        add = partial(_time, ctx, table, moved=8.0 * gate.nbytes, model=name)
        add("silu and product, no weights", _both_ways(_swiglu, [gate, up]))
        if gated := _ours("kernels", "gated"):
            add("moefold, with weights", _both_ways(lambda g, u, w, f=gated: f(F.silu, g, u, w), [gate, up, weight]))
            add("moefold, no weights", _both_ways(lambda g, u, f=gated: f(F.silu, g, u), [gate, up]))
        if inner := _ours("modules.experts.kernels", "weighted_inner"):
            add(
                "moefold, with weights, by operators",
                _both_ways(lambda g, u, w, f=inner: f(g, u, w, F.silu), [gate, up, weight]),
            )
        del gate, up, add
        free_memory()


def _compiled(ctx: Context) -> None:
    """Last, as compiling takes long."""
    table = "compiled, forward and backward"
    config = layer_config(ctx, MODELS[0])
    make = partial(torch.compile, backend=ctx.pick("inductor", "eager"))
    x, weight = _random(ctx, tokens_of(ctx), config.hidden_size, grad=True), _random(ctx, config.hidden_size, grad=True)
    _time(ctx, table, "RMSNorm", _both_ways(make(_plain_norm), [x, weight]), moved=5.0 * x.nbytes)
    shape = tokens_of(ctx) * config.num_experts_per_tok, config.moe_intermediate_size
    gate, up = _random(ctx, *shape, grad=True), _random(ctx, *shape, grad=True)
    _time(ctx, table, "SwiGLU, no weights", _both_ways(make(_swiglu), [gate, up]), moved=8.0 * gate.nbytes)


def _scattered_count(flat: Tensor, experts: int) -> Tensor:
    return flat.new_zeros(experts).scatter_add_(0, flat, torch.ones_like(flat))


def _searched_count(ordered: Tensor, edges: Tensor) -> Tensor:
    return torch.searchsorted(ordered, edges).diff()


def _compared_count(flat: Tensor, edges: Tensor) -> Tensor:
    return (flat.unsqueeze(1) == edges[:-1]).sum(0)


def _sorting(ctx: Context) -> None:
    table = "order and count of choices"
    for name in MODELS:
        config = layer_config(ctx, name)
        flat = _choices(ctx, config).flatten()
        experts = config.num_experts
        add = partial(_time, ctx, table, model=name)
        for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8):
            narrow = flat.to(dtype)
            add(f"stable sort, {str(dtype).removeprefix('torch.')}", partial(torch.sort, narrow, stable=True))
        ordered = flat.to(torch.int32).sort(stable=True).values
        edges = torch.arange(experts + 1, device=ctx.device, dtype=torch.int32)
        add("count: scatter_add_", partial(_scattered_count, flat, experts))
        add("count: bincount (waits)", partial(torch.bincount, flat, minlength=experts))
        add("count: searchsorted in the order", partial(_searched_count, ordered, edges))
        add("count: histc", partial(torch.histc, flat.float(), experts, 0, experts - 1))
        add("count: comparison with all", partial(_compared_count, flat, edges))


def _moe_layers(ctx: Context) -> None:
    table = "MoE layer without shared expert, forward and backward"
    for name in MODELS:
        config = layer_config(ctx, name)
        with torch.device(ctx.device):
            layer = MoELayer(config.hidden_size, config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size,
                             router=RouterOptions(norm_topk_prob=config.norm_topk_prob))  # fmt: skip
        layer = layer.to(ctx.device, torch.bfloat16).train()
        x = _random(ctx, 1, tokens_of(ctx), config.hidden_size, grad=True)
        flops = 18.0 * tokens_of(ctx) * config.num_experts_per_tok * config.hidden_size * config.moe_intermediate_size
        step = _both_ways(lambda x, *_, m=layer: m(x), [x, *layer.parameters()])
        _time(ctx, table, "moefold", step, flops=flops, model=name)
        assert isinstance(layer.experts, Experts)
        layer.experts.kernel = "fp8"
        _time(ctx, table, "moefold, expert_kernel='fp8'", _in_float8(ctx, step), flops=flops, model=name)
        del layer, step
        free_memory()


# ---- attention kernels -----------------------------------------------------------------------------------------------


def _attention(ctx: Context) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    table = "attention kernels, one row, forward and backward (FLOPs of causal attention)"
    for name in MODELS:
        config = layer_config(ctx, name)
        heads, kv, d, s = config.num_attention_heads, config.num_key_value_heads, config.head_dim, tokens_of(ctx)
        q, k, v = (_random(ctx, 1, n, s, d, grad=True) for n in (heads, kv, kv))
        flops = 3 * 4.0 * heads * d * s * (s + 1) / 2
        add = partial(_time, ctx, table, flops=flops, model=name)
        mask = torch.ones(s, s, dtype=torch.bool, device=ctx.device).tril_()[None, None]

        def fused(
            backend: SDPBackend,
            grouped: bool,
            mask: Tensor | None,
            q: Tensor,
            k: Tensor,
            v: Tensor,
            on: bool = ctx.on_gpu,
        ) -> Tensor:
            if not grouped:
                k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
            with sdpa_kernel(backend if on else SDPBackend.MATH):
                return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=grouped)

        kinds = (
            ("flash, causal", SDPBackend.FLASH_ATTENTION, True, None),
            ("cuDNN, causal", SDPBackend.CUDNN_ATTENTION, True, None),
            ("memory-efficient, causal, heads repeated", SDPBackend.EFFICIENT_ATTENTION, False, None),
            ("memory-efficient, dense mask, heads repeated", SDPBackend.EFFICIENT_ATTENTION, False, mask),
            ("cuDNN, dense mask", SDPBackend.CUDNN_ATTENTION, True, mask),
        )
        for label, backend, grouped, dense in kinds:
            add(label, _both_ways(partial(fused, backend, grouped, dense), [q, k, v]))
        _varlen(ctx, add, [x.detach()[0].transpose(0, 1).contiguous().requires_grad_() for x in (q, k, v)])
        del q, k, v, mask, add
        free_memory()


def _varlen(ctx: Context, add: Callable[..., None], inputs: list[Tensor]) -> None:
    from gpu_parts.packed import documents

    tokens, heads = inputs[0].shape[:2]
    number_N = documents(ctx, 1, tokens)[0]
    border = torch.nonzero(number_N.diff()).flatten().add(1).to(torch.int32)
    zero, end = (torch.tensor([n], device=ctx.device, dtype=torch.int32) for n in (0, tokens))
    whole, packed = torch.cat([zero, end]), torch.cat([zero, border, end])

    def call(ends: Tensor, longest: int, window: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.needs_gpu()
        from torch.nn.attention.varlen import varlen_attn

        k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
        out = varlen_attn(q, k, v, ends, ends, longest, longest, window_size=(window, 0))
        assert isinstance(out, Tensor)  # and no statistics beside it
        return out

    longest = int(packed.diff().max())
    add("varlen, causal, heads repeated", _both_ways(partial(call, whole, tokens, -1), inputs))
    add("varlen, 6 documents, heads repeated", _both_ways(partial(call, packed, longest, -1), inputs))
    add("varlen, half as window, heads repeated", _both_ways(partial(call, whole, tokens, tokens // 2 - 1), inputs))


# ---- cross-entropy ---------------------------------------------------------------------------------------------------


def _cross_entropy(ctx: Context) -> None:
    config = layer_config(ctx, "qwen2-57b-a14b")
    tokens, vocab, hidden = tokens_of(ctx), config.vocab_size, config.hidden_size
    with torch.device(ctx.device):
        head = VocabularyHead(vocab, hidden)
    head = head.to(ctx.device, torch.bfloat16)
    x, label = _random(ctx, tokens, hidden, grad=True), torch.randint(vocab, (tokens,), device=ctx.device)
    weight = torch.ones(tokens, device=ctx.device)
    flops = 6.0 * tokens * vocab * hidden

    def measure(step: Step) -> dict[str, Any]:
        step()
        if ctx.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        ms = median_ms(ctx, step, rounds=5, warmup=1)
        peak = (torch.cuda.max_memory_allocated() - before) / 1e9 if ctx.on_gpu else None
        return {"ms": ms, "TFLOP/s": flops / ms / 1e9, "peak_gb": peak}

    def ours(x: Tensor, _: Tensor) -> Tensor:
        return head.cross_entropy(x, label, weight)

    def chunked(elements: int) -> dict[str, Any]:
        with mock.patch.dict(logit_chunks.CHUNK_ELEMENTS, {ctx.device.type: elements}):
            return measure(_both_ways(ours, [x, head.weight]))

    def whole(x: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, w).float(), label, reduction="sum")

    title = f"cross-entropy, vocabulary {vocab:,}, with its products, forward and backward"
    attempt = partial(ctx.record.attempt, title, limit=40)
    attempt("moefold", lambda: measure(_both_ways(ours, [x, head.weight])))
    for power in ctx.pick((26, 27, 28, 29, 30), (11, 12)):
        attempt(f"moefold, chunks of 2^{power} logits", partial(chunked, 1 << power))
    attempt("F.cross_entropy, all logits", lambda: measure(_both_ways(whole, [x, head.weight])))

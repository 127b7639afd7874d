# SPDX-License-Identifier: Apache-2.0
"""Whether it computes the right thing on a GPU: blocks against float64, text against transformers, training runs."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gpu_parts import correct_attention, correct_options, correct_training
from gpu_parts.record import Context, free_memory
from gpu_parts.shapes import default_dtype
from lightning_moefold import MoECausalLM
from lightning_moefold.modules import Attention, DecoderLayer, Experts, MoELayer
from lightning_moefold.modules.experts.kernels import ExpertKernel
from lightning_moefold.modules.vocabulary import VocabularyHead

DTYPES = (torch.float32, torch.bfloat16)


def run(ctx: Context) -> None:
    """The part."""
    torch.set_float32_matmul_precision("highest")
    correct_training.run_optimizers(ctx)
    free_memory()
    correct_attention.run(ctx)
    free_memory()
    table = "blocks against float64: relative error ||a - b|| / ||b||"
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        ctx.record.attempt(table, "MoE layer", partial(_experts, ctx, dtype), dtype=name)
        ctx.record.attempt(table, "cross-entropy, vocabulary 151,936", partial(_cross_entropy, ctx, dtype), dtype=name)
    ctx.record.attempt(table, "MoE layer, FP8", partial(_experts, ctx, torch.bfloat16, "fp8"), dtype="bfloat16")
    table = "a layer, run twice"
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        ctx.record.attempt(table, "MoE layer, the same again: equal bits", partial(_same_bits, ctx, dtype), dtype=name)
        for mode in (None, "full", "selective"):
            what = f"decoder layer, recompute={mode!r}" if mode else "decoder layer, the same again"
            ctx.record.attempt(table, what, partial(_again, ctx, dtype, mode), dtype=name)
    ctx.record.attempt("text", "generate, as transformers", partial(_generate, ctx))
    free_memory()
    correct_training.run_resume(ctx)
    free_memory()
    correct_options.run(ctx)


def relative(found: Tensor, exact: Tensor) -> float:
    """``||a - b|| / ||b||``."""
    return float((found.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-30))


def gradients(*tensors: Tensor) -> list[Tensor]:
    """Their gradients; each must have one."""
    found = [tensor.grad for tensor in tensors if tensor.grad is not None]
    assert len(found) == len(tensors), "a tensor has no gradient"
    return found


def _experts(ctx: Context, dtype: torch.dtype, kernel: ExpertKernel = "auto") -> dict[str, Any]:
    if kernel == "fp8":
        ctx.needs_float8()
    torch.manual_seed(0)
    hidden, width = ctx.pick((512, 256), (32, 32))
    with torch.device(ctx.device):
        layer = MoELayer(hidden, 16, 4, width, shared_ffn_hidden_size=width)
    layer.to(ctx.device, dtype)
    exact = copy.deepcopy(layer).double()
    for module, way in ((layer, kernel), (exact, "loop")):
        assert isinstance(module.experts, Experts)
        module.experts.kernel = way
    x = torch.randn(2, ctx.pick(512, 16), hidden, device=ctx.device).to(dtype)
    results = []
    for module, rows in ((layer, x.clone()), (exact, x.double())):
        y = module(rows.requires_grad_())
        y.float().square().mean().backward() if dtype != torch.float32 else y.square().mean().backward()
        results.append([y.detach(), *gradients(rows, *module.parameters())])
    errors = [relative(a, b) for a, b in zip(*results, strict=True)]
    most = max(errors)
    return {"output": errors[0], "gradient of the input": errors[1], "of weights, most": max(errors[2:]),
            "ok": most < (0.12 if kernel == "fp8" else 1e-3 if dtype == torch.float32 else 8e-2)}  # fmt: skip


def _cross_entropy(ctx: Context, dtype: torch.dtype) -> dict[str, Any]:
    torch.manual_seed(0)
    vocab, hidden, tokens = ctx.pick((151936, 512, 3000), (96, 32, 50))
    with torch.device(ctx.device):
        head = VocabularyHead(vocab, hidden).to(dtype)
    x = torch.randn(tokens, hidden, device=ctx.device).to(dtype).requires_grad_()
    label = torch.randint(vocab, (tokens,), device=ctx.device)
    weight = torch.rand(tokens, device=ctx.device)
    loss = head.cross_entropy(x, label, weight)
    loss.backward()
    x64, w64 = (t.detach().double().requires_grad_() for t in (x, head.weight))
    exact = (F.cross_entropy(x64 @ w64.t(), label, reduction="none") * weight.double()).sum()
    exact.backward()
    found = {"output": relative(loss.detach(), exact.detach()), "gradient of the input": relative(*gradients(x, x64)),
             "of weights, most": relative(*gradients(head.weight, w64))}  # fmt: skip
    return found | {"ok": max(found.values()) < (1e-4 if dtype == torch.float32 else 1e-2)}


def _small_layer(ctx: Context, dtype: torch.dtype) -> DecoderLayer:
    hidden, width = ctx.pick((512, 256), (32, 32))
    with torch.device(ctx.device), default_dtype(dtype):
        layer = DecoderLayer(hidden, Attention(hidden, 8, 2), MoELayer(hidden, 16, 4, width))
    return layer.to(ctx.device, dtype).train()


def _passes(layer: DecoderLayer | MoELayer, x: Tensor, modes: tuple[Any, Any]) -> list[list[Tensor]]:
    """Outputs and all gradients of two passes over the same input, each with a mode of recomputation."""
    results = []
    for mode in modes:
        if isinstance(layer, DecoderLayer):
            layer.recompute = mode
        layer.zero_grad()
        rows = x.clone().requires_grad_()
        y = layer(rows)
        y.float().square().mean().backward()
        results.append([y.detach(), *(g.clone() for g in gradients(rows, *layer.parameters()))])
    return results


def _same_bits(ctx: Context, dtype: torch.dtype) -> dict[str, Any]:
    """Of the layer without attention, whose fused kernels add in an order of their own each time."""
    torch.manual_seed(0)
    moe = _small_layer(ctx, dtype).mlp
    assert isinstance(moe, MoELayer)
    x = torch.randn(2, ctx.pick(1024, 16), moe.hidden_size, device=ctx.device).to(dtype)
    same = all(torch.equal(a, b) for a, b in zip(*_passes(moe, x, (None, None)), strict=True))
    return {"equal bits": same, "ok": same}


def _again(ctx: Context, dtype: torch.dtype, recompute: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    layer = _small_layer(ctx, dtype)
    x = torch.randn(2, ctx.pick(1024, 16), layer.hidden_size, device=ctx.device).to(dtype)
    results = _passes(layer, x, (None, recompute))
    same = all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    most = max(relative(b, a) for a, b in zip(*results, strict=True))
    return {"equal bits": same, "largest error": most, "ok": most < (1e-5 if dtype == torch.float32 else 1e-2)}


def _generate(ctx: Context) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    from lightning_moefold.testing import make_checkpoint

    path = make_checkpoint(ctx.scratch / "text", "qwen2_moe", num_experts=8)
    ours = MoECausalLM.from_pretrained(path, dtype=torch.float32).to(ctx.device)
    theirs: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(ctx.device).eval()
    token = torch.randint(1, 96, (4, 12), generator=torch.Generator().manual_seed(0)).to(ctx.device)
    mask = torch.ones_like(token)
    mask[1, :3], mask[3, :7] = 0, 0
    ours_out = ours.generate(token, mask, max_new_tokens=12, eos_token_id=(), pad_token_id=0)
    with torch.no_grad():
        their_out = theirs.generate(
            input_ids=token, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None
        )
    share = float((ours_out[:, 12:] == their_out[:, 12:]).float().mean())
    return {"tokens that agree": share, "ok": share == 1.0}

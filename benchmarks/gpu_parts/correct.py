# SPDX-License-Identifier: Apache-2.0
"""Whether it computes the right thing on a GPU: blocks against float64, text against transformers, training runs."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gpu_parts import correct_attention, correct_training
from gpu_parts.record import Context, free_memory
from gpu_parts.shapes import default_dtype
from lightning_moefold import MoECausalLM
from lightning_moefold.modules import Attention, DecoderLayer, Experts, MoELayer
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
    table = "a decoder layer, run twice"
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        ctx.record.attempt(table, "the same again: equal bits", partial(_again, ctx, dtype, None, True), dtype=name)
        for mode in ("full", "selective"):
            ctx.record.attempt(table, f"recompute={mode!r}", partial(_again, ctx, dtype, mode, False), dtype=name)
    ctx.record.attempt("text", "generate, as transformers", partial(_generate, ctx))
    free_memory()
    correct_training.run_resume(ctx)


def relative(found: Tensor, exact: Tensor) -> float:
    """``||a - b|| / ||b||``."""
    return float((found.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-30))


def gradients(*tensors: Tensor) -> list[Tensor]:
    """Their gradients; each must have one."""
    found = [tensor.grad for tensor in tensors if tensor.grad is not None]
    assert len(found) == len(tensors), "a tensor has no gradient"
    return found


def _experts(ctx: Context, dtype: torch.dtype) -> dict[str, Any]:
    torch.manual_seed(0)
    hidden, width = ctx.pick((512, 256), (32, 32))
    with torch.device(ctx.device):
        layer = MoELayer(hidden, 16, 4, width, shared_ffn_hidden_size=width)
    layer.to(ctx.device, dtype)
    exact = copy.deepcopy(layer).double()
    experts = exact.experts
    assert isinstance(experts, Experts)
    experts.kernel = "loop"
    x = torch.randn(2, ctx.pick(512, 16), hidden, device=ctx.device).to(dtype)
    results = []
    for module, rows in ((layer, x.clone()), (exact, x.double())):
        y = module(rows.requires_grad_())
        y.float().square().mean().backward() if dtype != torch.float32 else y.square().mean().backward()
        results.append([y.detach(), *gradients(rows, *module.parameters())])
    errors = [relative(a, b) for a, b in zip(*results, strict=True)]
    most = max(errors)
    return {"output": errors[0], "gradient of the input": errors[1], "of weights, most": max(errors[2:]),
            "ok": most < (1e-3 if dtype == torch.float32 else 8e-2)}  # fmt: skip


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


def _again(ctx: Context, dtype: torch.dtype, recompute: Any, bits: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    layer = _small_layer(ctx, dtype)
    x = torch.randn(2, ctx.pick(1024, 16), layer.hidden_size, device=ctx.device).to(dtype)
    results = []
    for mode in (None, recompute):
        layer.recompute = mode
        layer.zero_grad()
        rows = x.clone().requires_grad_()
        y = layer(rows)
        y.float().square().mean().backward()
        results.append([y.detach(), *(g.clone() for g in gradients(rows, *layer.parameters()))])
    same = all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    most = max(relative(b, a) for a, b in zip(*results, strict=True))
    return {
        "equal bits": same,
        "largest error": most,
        "ok": same if bits else most < (1e-5 if dtype == torch.float32 else 1e-2),
    }


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

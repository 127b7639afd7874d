# SPDX-License-Identifier: Apache-2.0
"""Each branch of attention, gradients included, against a plain softmax in float64."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu_parts.record import Context
from lightning_moefold.modules import Attention


@dataclass(frozen=True)
class Case:
    """What queries see.

    Args:
        name: First column.
        rows: B.
        length: S.
        kv_heads: Of 8 query heads.
        window: Keys that a query sees at most.
        packed: Whether rows hold several documents.
        padded: Whether rows are padded on the left.
        causal: Whether queries see no later keys.
    """

    name: str
    rows: int
    length: int
    kv_heads: int = 2
    window: int | None = None
    packed: bool = False
    padded: bool = False
    causal: bool = True


def run(ctx: Context) -> None:
    """All branches, in float32 and bfloat16."""
    short, long = ctx.pick((600, 5000), (24, 72))
    cases = (
        Case("causal", 2, short),
        Case("causal, as many key heads", 2, short, kv_heads=8),
        Case("documents", 2, short, packed=True),
        Case("window", 2, short, window=short // 3),
        Case("documents and window", 2, short, window=short // 3, packed=True),
        Case("left padding", 2, short, padded=True),
        Case("not causal", 2, short, causal=False),
        Case("long, causal", 1, long),
        Case("long, documents", 1, long, packed=True),
        Case("long, window", 1, long, window=long // 3),
        Case("long, left padding", 1, long, padded=True),
    )
    table = "attention against a plain softmax in float64: relative error ||a - b|| / ||b||"
    for dtype in (torch.float32, torch.bfloat16):
        for case in cases:
            labels: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "S": case.length}
            ctx.record.attempt(table, case.name, partial(_compare, ctx, case, dtype), **labels)


def _compare(ctx: Context, case: Case, dtype: torch.dtype) -> dict[str, Any]:
    torch.manual_seed(0)
    hidden, d = ctx.pick((512, 64), (64, 8))
    with torch.device(ctx.device):
        attention = Attention(
            hidden,
            8,
            case.kv_heads,
            d,
            qkv_bias=True,
            sliding_window=case.window,
            causal=case.causal,
            rope_theta=10000.0,
        )
    attention.to(ctx.device, dtype)
    x_BSD = torch.randn(case.rows, case.length, hidden, device=ctx.device).to(dtype).requires_grad_()
    batch = attention.batch_of(x_BSD)
    real_BS = torch.ones(case.rows, case.length, dtype=torch.bool, device=ctx.device)
    document_BS = None
    if case.packed:
        cuts = torch.tensor([[0.2, 0.25, 0.7], [0.5, 0.6, 0.61]], device=ctx.device)[: case.rows] * case.length
        document_BS = (torch.arange(case.length, device=ctx.device) >= cuts.unsqueeze(-1)).sum(1)
        batch.document_BS = document_BS
    if case.padded:
        for row in range(case.rows):
            real_BS[row, : case.length // (row + 3)] = False
        batch.real_BS = real_BS
    y_BSD = attention(x_BSD.flatten(0, 1), batch).view_as(x_BSD)
    # Padded positions may hold anything, and ask for nothing.
    grad_BSD = torch.randn_like(y_BSD) * real_BS.unsqueeze(-1)
    inputs = [x_BSD, attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    grads = torch.autograd.grad(y_BSD, inputs, grad_BSD)
    exact_BSD, exact_grads = _exact(attention, x_BSD, grad_BSD, _seen(case, document_BS, real_BS))
    output = _relative(y_BSD.detach()[real_BS], exact_BSD[real_BS])
    errors = [_relative(a, b) for a, b in zip(grads, exact_grads, strict=True)]
    most = max(output, *errors)
    return {"output": output, "gradient of the input": errors[0], "of weights, most": max(errors[1:]),
            "ok": most < (1e-3 if dtype == torch.float32 else 3e-2)}  # fmt: skip


def _seen(case: Case, document_BS: Tensor | None, real_BS: Tensor) -> Tensor:
    """Which keys each query sees, ``[B, 1, S, S]``; each sees itself."""
    place_S = torch.arange(case.length, device=real_BS.device)
    behind_SS = place_S.unsqueeze(1) - place_S
    seen_BSS = (behind_SS >= 0) if case.causal else torch.ones_like(behind_SS, dtype=torch.bool)
    if case.window is not None:
        seen_BSS = seen_BSS & (behind_SS < case.window)
    seen_BSS = seen_BSS.expand(case.rows, -1, -1) & real_BS.unsqueeze(1)
    if document_BS is not None:
        seen_BSS = seen_BSS & (document_BS.unsqueeze(2) == document_BS.unsqueeze(1))
    return (seen_BSS | (behind_SS == 0)).unsqueeze(1)


def _exact(attention: Attention, x_BSD: Tensor, grad_BSD: Tensor, seen: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output and gradients of input and projections, step by step in float64."""
    rows, length, _ = x_BSD.shape
    d, heads, kv = attention.head_dim, attention.num_heads, attention.num_kv_heads
    x = x_BSD.detach().double().requires_grad_()
    names = ("q_proj", "k_proj", "v_proj")
    weights = [getattr(attention, name).weight.detach().double().requires_grad_() for name in names]
    biases = [getattr(attention, name).bias.detach().double() for name in names]
    q, k, v = ((x @ w.t() + b).view(rows, length, -1, d).transpose(1, 2) for w, b in zip(weights, biases, strict=True))
    frequency = 10000.0 ** (-torch.arange(0, d, 2, device=x.device, dtype=torch.float64) / d)
    angle = torch.arange(length, device=x.device, dtype=torch.float64).unsqueeze(1) * frequency
    q, k = (_rotate(t, angle.cos(), angle.sin()) for t in (q, k))
    k, v = (t.repeat_interleave(heads // kv, 1) for t in (k, v))
    score = (q @ k.transpose(2, 3)) / d**0.5
    y = score.masked_fill(~seen, float("-inf")).softmax(-1) @ v
    y = y.transpose(1, 2).reshape(rows, length, heads * d) @ attention.o_proj.weight.detach().double().t()
    return y.detach(), torch.autograd.grad(y, [x, *weights], grad_BSD.double())


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def _relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm().clamp(min=1e-30))

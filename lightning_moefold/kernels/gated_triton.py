# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for :mod:`.gated`: one program per row loops over blocks of columns and computes in float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_moefold.kernels.gated import GatedGradients

_BLOCK = 2048


def forward(gate_MF: Tensor, up_MF: Tensor, weight_M: Tensor | None) -> Tensor:
    """See :func:`.gated.gated_forward`."""
    inner_MF = torch.empty_like(gate_MF)
    rows, width = gate_MF.shape
    if rows and width:
        block = min(_BLOCK, triton.next_power_of_2(width))
        _forward[rows, triton.cdiv(width, block)](
            gate_MF, up_MF, weight_M, inner_MF, width, WEIGHTED=weight_M is not None, BLOCK=block
        )
    return inner_MF


def backward(
    gate_MF: Tensor,
    up_MF: Tensor,
    weight_M: Tensor | None,
    grad_MF: Tensor,
    owns_grad: bool,
    wants_weight: bool,
    wants_inner: bool,
) -> GatedGradients:
    """See :func:`.gated.gated_backward`; the gradient of the gate overwrites ``grad_MF`` if ``owns_grad``."""
    rows, width = gate_MF.shape
    gate = grad_MF if owns_grad else torch.empty_like(gate_MF)
    up, inner = torch.empty_like(up_MF), torch.empty_like(gate_MF) if wants_inner else None
    wants_weight = wants_weight and weight_M is not None
    grad_weight = weight_M.new_zeros(rows) if wants_weight and weight_M is not None else None
    if rows and width:
        block = min(_BLOCK, triton.next_power_of_2(width))
        _backward[rows,](
            gate_MF, up_MF, weight_M, grad_MF, gate, up, inner, grad_weight, width,
            WEIGHTED=weight_M is not None, WANTS_WEIGHT=wants_weight, WANTS_INNER=wants_inner, BLOCK=block,
        )  # fmt: skip
    return GatedGradients(gate, up, grad_weight, inner)


@triton.jit
def _forward(gate, up, weight, inner, width, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    held = column < width
    at = row * width + column
    g = tl.load(gate + at, mask=held, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=held, other=0.0).to(tl.float32)
    result = g * tl.sigmoid(g) * u
    if WEIGHTED:
        result *= tl.load(weight + row).to(tl.float32)
    tl.store(inner + at, result.to(inner.dtype.element_ty), mask=held)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    gate, up, weight, grad, grad_gate, grad_up, inner, grad_weight, width,
    WEIGHTED: tl.constexpr, WANTS_WEIGHT: tl.constexpr, WANTS_INNER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    w = 1.0
    if WEIGHTED:
        w = tl.load(weight + row).to(tl.float32)
    product = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        held = column < width
        at = row * width + column
        g = tl.load(gate + at, mask=held, other=0.0).to(tl.float32)
        u = tl.load(up + at, mask=held, other=0.0).to(tl.float32)
        h = tl.load(grad + at, mask=held, other=0.0).to(tl.float32)
        share = tl.sigmoid(g)
        active = g * share
        if WANTS_WEIGHT:
            product += active * u * h
        if WANTS_INNER:
            tl.store(inner + at, (active * u * w).to(inner.dtype.element_ty), mask=held)
        h *= w
        tl.store(grad_up + at, (active * h).to(grad_up.dtype.element_ty), mask=held)
        slope = share * (1.0 + g * (1.0 - share))
        tl.store(grad_gate + at, (h * u * slope).to(grad_gate.dtype.element_ty), mask=held)
    if WANTS_WEIGHT:
        tl.store(grad_weight + row, tl.sum(product, axis=0))

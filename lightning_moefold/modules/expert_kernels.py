# SPDX-License-Identifier: Apache-2.0
"""Computation of gated experts: ``y_a = sum over rows m of token a of  w_m * down(act(gate(x_a)) * up(x_a))``.

Two ways, by device, and a third one behind the same call in :mod:`.transformer_engine`:

- CPU (and whatever the grouped kernel does not take): one expert after the other, forward and backward, so that gather,
  activation, its derivative and the weighted sum per token stay in cache between the products;
- CUDA: ``torch.nn.functional.grouped_mm``, three kernels for all experts, counts on the device.

The weight's gradient comes from the activation and the gradient of it: so backward needs no expert's output. Kept for backward are
the two products before the activation and the tokens, ``A * D + 2 * M * F`` numbers on the first way, which needs no copy of
a token per expert, and ``M * D + 2 * M * F`` on the second.

Legend: A tokens, M rows in expert order, L local experts, D hidden size, F expert width, c rows of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_moefold.dispatch import ExpertRows
from lightning_moefold.modules.kept_memory import FOR_BACKWARD
from lightning_moefold.modules.parts import gradient_like

Activation = Callable[[Tensor], Tensor]

ExpertKernel = Literal["auto", "loop", "grouped_mm", "transformer_engine"]
EXPERT_KERNELS = ("auto", "loop", "grouped_mm", "transformer_engine")

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def gated_experts(
    x_AD: Tensor,
    rows: ExpertRows,
    activation: Activation,
    gate_LFD: Tensor,
    up_LFD: Tensor,
    down_LDF: Tensor,
    kernel: Literal["auto", "loop", "grouped_mm"] = "auto",
) -> Tensor:
    """Runs gated experts on their rows and sums them per token, ``[A, D] -> [A, D]``.

    Args:
        x_AD: Tokens.
        rows: Which token each row reads, and with what weight.
        activation: Of the gate.
        gate_LFD: Weights of the gate.
        up_LFD: Weights of the other factor.
        down_LDF: Weights back to D.
        kernel: Which way; ``"auto"`` by device. What ``"grouped_mm"`` cannot take (float64, odd widths) goes by loop.
    """
    wanted = x_AD.is_cuda if kernel == "auto" else kernel == "grouped_mm"
    if wanted and _kernel_takes(x_AD, rows, gate_LFD):
        return _grouped(x_AD, rows, activation, gate_LFD, up_LFD, down_LDF)
    counts = rows.counts_L.tolist() if rows.counts is None else rows.counts
    job = _Job(rows.token_M, rows.distinct, counts, activation)
    return _ExpertByExpert.apply(x_AD, rows.weight_M, job, gate_LFD, up_LFD, down_LDF)


# ---- all experts at once ---------------------------------------------------------------------------------------------


def _kernel_takes(x_AD: Tensor, rows: ExpertRows, weight_LFD: Tensor) -> bool:
    """It has no float64, and rows of all operands must be multiples of 16 bytes."""
    aligned = all(n * x_AD.element_size() % 16 == 0 for n in weight_LFD.shape[1:])
    return x_AD.dtype in _KERNEL_DTYPES and aligned and rows.weight_M.shape[0] > 0


def _grouped(x_AD: Tensor, rows: ExpertRows, activation: Activation, *weights: Tensor) -> Tensor:
    ends_L = rows.counts_L.cumsum(0).to(torch.int32)
    gate_LFD, up_LFD, down_LDF = weights
    x_MD = read_tokens(x_AD, rows)
    gate_MF, up_MF = (F.grouped_mm(x_MD, w_LFD.transpose(1, 2), offs=ends_L) for w_LFD in (gate_LFD, up_LFD))
    y_MD = _GroupedDown.apply(gate_MF, up_MF, rows.weight_M, down_LDF, ends_L, activation)
    return sum_rows(y_MD, rows, x_AD.shape[0])


class _GroupedDown(torch.autograd.Function):
    """``down(weight * act(gate) * up)`` of all experts; keeps the two products and makes the rest again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        gate_MF: Tensor,
        up_MF: Tensor,
        weight_M: Tensor,
        down_LDF: Tensor,
        ends_L: Tensor,
        activation: Activation,
    ) -> Tensor:
        ctx.save_for_backward(gate_MF, up_MF, weight_M, down_LDF, ends_L)
        ctx.activation = activation
        inner_MF = activation(gate_MF).mul_(up_MF).mul_(weight_M.unsqueeze(1))
        return F.grouped_mm(inner_MF, down_LDF.transpose(1, 2), offs=ends_L)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate_MF, up_MF, weight_M, down_LDF, ends_L = ctx.saved_tensors
        grad_MD = grads[0].contiguous()
        grad_inner_MF = F.grouped_mm(grad_MD, down_LDF, offs=ends_L)
        *through, inner_MF = _through_inner(
            ctx.activation, gate_MF, up_MF, weight_M, grad_inner_MF, ctx.needs_input_grad[2]
        )
        grad_down = None
        if ctx.needs_input_grad[3]:
            grad_down = F.grouped_mm(grad_MD.t(), inner_MF.mul_(weight_M.unsqueeze(1)), offs=ends_L)
        return *through, grad_down, None, None


class _Weighted(torch.autograd.Function):
    """``weight * act(gate) * up``; keeps the two products and makes the rest again in backward."""

    @staticmethod
    def forward(ctx: Any, gate_MF: Tensor, up_MF: Tensor, weight_M: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(gate_MF, up_MF, weight_M)
        ctx.activation = activation
        return activation(gate_MF).mul_(up_MF).mul_(weight_M.unsqueeze(1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate_MF, up_MF, weight_M = ctx.saved_tensors
        grad_MF = grads[0].clone()  # it is not ours to write into
        *through, _ = _through_inner(ctx.activation, gate_MF, up_MF, weight_M, grad_MF, ctx.needs_input_grad[2])
        return *through, None


def weighted_inner(gate_MF: Tensor, up_MF: Tensor, weight_M: Tensor, activation: Activation) -> Tensor:
    """What the product back to D takes, ``weight * act(gate) * up`` in the dtype of ``gate``."""
    return _Weighted.apply(gate_MF, up_MF, weight_M, activation)


def _through_inner(
    activation: Activation, gate_MF: Tensor, up_MF: Tensor, weight_M: Tensor, grad_MF: Tensor, wants_weight: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of the two products and of the weights, and ``act(gate) * up``; writes into ``grad_MF``."""
    active_MF = activation(gate_MF)
    inner_MF, grad_weight = active_MF * up_MF, None
    if wants_weight:
        grad_weight = torch.linalg.vecdot(inner_MF.to(weight_M.dtype), grad_MF.to(weight_M.dtype))
    grad_MF.mul_(weight_M.unsqueeze(1))
    grad_up = active_MF.mul_(grad_MF)
    return _through_activation(activation, gate_MF, grad_MF.mul_(up_MF)), grad_up, grad_weight, inner_MF


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_AD: Tensor, rows: ExpertRows) -> Tensor:
        assert rows.token_M is not None
        ctx.rows, ctx.tokens = rows, x_AD.shape[0]
        return x_AD.index_select(0, rows.token_M)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _add_rows(grads[0], ctx.rows, ctx.tokens), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_MD: Tensor, rows: ExpertRows, tokens: int) -> Tensor:
        ctx.rows = rows
        return _add_rows(y_MD, rows, tokens)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, ctx.rows.token_M), None, None


def _add_rows(y_MD: Tensor, rows: ExpertRows, tokens: int) -> Tensor:
    assert rows.token_M is not None
    if rows.distinct:
        return y_MD.new_empty(tokens, y_MD.shape[1]).index_copy_(0, rows.token_M, y_MD)
    total = y_MD.new_zeros(tokens, y_MD.shape[1], dtype=torch.promote_types(y_MD.dtype, torch.float32))
    return total.index_add_(0, rows.token_M, y_MD.to(total.dtype)).to(y_MD.dtype)


def read_tokens(x_AD: Tensor, rows: ExpertRows) -> Tensor:
    """The token of each row, ``[A, D] -> [M, D]``."""
    return x_AD if rows.token_M is None else _Read.apply(x_AD, rows)


def sum_rows(y_MD: Tensor, rows: ExpertRows, tokens: int) -> Tensor:
    """Sum of each token's rows in at least float32, ``[M, D] -> [A, D]``; zero for tokens that no row reads."""
    return y_MD if rows.token_M is None else _Sum.apply(y_MD, rows, tokens)


# ---- expert by expert ------------------------------------------------------------------------------------------------


class _Job:
    """What :class:`_ExpertByExpert` is told besides tensors with gradients."""

    def __init__(self, token_M: Tensor | None, distinct: bool, counts: list[int], activation: Activation) -> None:
        self.token_M, self.distinct, self.counts, self.activation = token_M, distinct, counts, activation

    def blocks(self) -> Iterator[tuple[int, slice, Tensor | slice]]:
        """Experts that have rows, their rows, and the tokens these read."""
        start = 0
        for expert, count in enumerate(self.counts):
            if count:
                rows = slice(start, start + count)
                yield expert, rows, rows if self.token_M is None else self.token_M[rows]
            start += count

    def read(self, x_AD: Tensor, tokens: Tensor | slice) -> Tensor:
        return x_AD[tokens] if isinstance(tokens, slice) else x_AD.index_select(0, tokens)

    def total(self, x_AD: Tensor) -> Tensor:
        """Where rows are summed per token: in at least float32, unless nothing is summed."""
        if self.distinct:
            return torch.empty_like(x_AD)
        return x_AD.new_zeros(x_AD.shape, dtype=torch.promote_types(x_AD.dtype, torch.float32))

    def stack_like(self, weight: Tensor) -> Tensor:
        """Room for the gradient of a stack; zero for experts without rows, which nobody visits."""
        grad = gradient_like(weight)
        for expert, count in enumerate(self.counts):
            if not count:
                grad[expert].zero_()
        return grad

    def add(self, total_AD: Tensor, tokens: Tensor | slice, y_cD: Tensor) -> None:
        if isinstance(tokens, slice):
            total_AD[tokens] = y_cD
        elif self.distinct:
            total_AD.index_copy_(0, tokens, y_cD)
        elif y_cD.dtype == total_AD.dtype:
            total_AD.index_add_(0, tokens, y_cD)
        else:  # an expert reads a token once, so reading, adding and writing back is a sum, and faster than a copy in float32
            total_AD.index_copy_(0, tokens, total_AD.index_select(0, tokens).add_(y_cD))


class _ExpertByExpert(torch.autograd.Function):
    """Gradients go straight into the stacks: indexing a stack under autograd would write a full-size one per expert."""

    @staticmethod
    def forward(ctx: Any, x_AD: Tensor, weight_M: Tensor, job: _Job, *weights: Tensor) -> Tensor:
        gate_LFD, up_LFD, down_LDF = weights
        gate_MF, up_MF = (FOR_BACKWARD.empty(x_AD, weight_M.shape[0], gate_LFD.shape[1]) for _ in range(2))
        total_AD = job.total(x_AD)
        for expert, rows, tokens in job.blocks():
            x_cD, gate, up = job.read(x_AD, tokens), gate_MF[rows], up_MF[rows]
            torch.mm(x_cD, gate_LFD[expert].t(), out=gate)
            torch.mm(x_cD, up_LFD[expert].t(), out=up)
            y_cD = job.activation(gate).mul_(up) @ down_LDF[expert].t()
            job.add(total_AD, tokens, y_cD.mul_(weight_M[rows].unsqueeze(1)))
        ctx.save_for_backward(x_AD, weight_M, gate_MF, up_MF, *weights)
        ctx.job = job
        return total_AD.to(x_AD.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_AD, weight_M, gate_MF, up_MF, gate_LFD, up_LFD, down_LDF = ctx.saved_tensors
        job: _Job = ctx.job
        need_x, need_weight = ctx.needs_input_grad[:2]
        grad_AD, total_AD = grads[0], job.total(x_AD) if need_x else None
        grad_weight = torch.empty_like(weight_M) if need_weight else None
        grad_gate, grad_up, grad_down = (
            job.stack_like(w) if needed else None
            for w, needed in zip((gate_LFD, up_LFD, down_LDF), ctx.needs_input_grad[3:], strict=True)
        )
        for expert, rows, tokens in job.blocks():
            grad_cD, weight_c1 = job.read(grad_AD, tokens), weight_M[rows].unsqueeze(1)
            grad_inner = grad_cD @ down_LDF[expert]
            active = job.activation(gate_MF[rows])
            inner = active * up_MF[rows]
            if grad_weight is not None:
                grad_weight[rows] = torch.linalg.vecdot(inner.to(weight_M.dtype), grad_inner.to(weight_M.dtype))
            if grad_down is not None:
                weighted_cD = torch.mul(grad_cD, weight_c1, out=torch.empty_like(grad_cD))
                torch.mm(weighted_cD.t(), inner, out=grad_down[expert])
            grad_inner.mul_(weight_c1)
            grad_up_cF = active.mul_(grad_inner)
            grad_gate_cF = _through_activation(job.activation, gate_MF[rows], grad_inner.mul_(up_MF[rows]))
            if grad_gate is not None or grad_up is not None:
                x_cD = job.read(x_AD, tokens)
            if grad_gate is not None:
                torch.mm(grad_gate_cF.t(), x_cD, out=grad_gate[expert])
            if grad_up is not None:
                torch.mm(grad_up_cF.t(), x_cD, out=grad_up[expert])
            if total_AD is not None:
                job.add(total_AD, tokens, torch.mm(grad_gate_cF, gate_LFD[expert]).addmm_(grad_up_cF, up_LFD[expert]))
        grad_x = None if total_AD is None else total_AD.to(x_AD.dtype)
        return grad_x, grad_weight, None, grad_gate, grad_up, grad_down


def _through_activation(activation: Activation, gate_cF: Tensor, grad_cF: Tensor) -> Tensor:
    """The gradient with respect to what the activation took; of SiLU in one pass."""
    if activation is F.silu:
        return torch.ops.aten.silu_backward(grad_cF, gate_cF)
    with torch.enable_grad():
        leaf = gate_cF.detach().requires_grad_()
        active = activation(leaf)
    return torch.autograd.grad(active, leaf, grad_cF)[0]

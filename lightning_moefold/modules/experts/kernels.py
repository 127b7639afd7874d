# SPDX-License-Identifier: Apache-2.0
"""Computation of gated experts: ``y_a = sum over rows m of token a of  w_m * down(act(gate(x_a)) * up(x_a))``.

Two ways, by device, and a third one behind the same call in :mod:`.transformer_engine`:

- CPU: one expert after the other, forward and backward, so that gather, activation, its derivative
  and the weighted sum per token stay in cache between the products;
- CUDA: all rows at once, with the products of :mod:`.products` and the fused steps of :mod:`..kernels` between them.

Backward can also compute the two products before the activation again (``again``), which then are not kept.

The weight's gradient comes from the activation and the gradient of it: so backward needs no expert's output. Kept for backward are
the two products before the activation and the tokens, ``A * D + 2 * M * F`` numbers on the first way, which needs no copy of
a token per expert, and ``M * D + 2 * M * F`` on the second.

With an adapter each of the three weights becomes ``W + s B A``. Rows are multiplied by A and then by B, so that no expert's
``B A`` is ever made; kept besides are the products of each row with the two A's, ``2 * M * R`` numbers.

Weights of a quantised base come as bytes, are decoded for a product, and stay bytes until backward.

Legend: A tokens, M rows in expert order, L local experts, D hidden size, F expert width, c rows of one expert, R rank of an
adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_moefold.comm import linear
from lightning_moefold.dispatch import ExpertRows
from lightning_moefold.kernels.compiled import unchanged
from lightning_moefold.kernels.gated import gated_backward, gated_forward, through_activation
from lightning_moefold.kernels.row_sums import sum_of_tokens
from lightning_moefold.modules.experts.cpu_cache import FOR_BACKWARD
from lightning_moefold.modules.experts.float8_products import Float8Products
from lightning_moefold.modules.experts.products import Products, choose_products, host_counts
from lightning_moefold.modules.experts.stack import gradient_like
from lightning_moefold.modules.quantized import CodedStack, decoded

Activation = Callable[[Tensor], Tensor]
Stack = Tensor | CodedStack

#: Rows that the CPU takes at a time of an expert with many more, whose intermediate results would be its peak of memory. Not of
#: 16-bit numbers: a sum over rows is then one product, and rounded once.
ROWS_AT_A_TIME = 1024

ExpertKernel = Literal["auto", "loop", "grouped_mm", "fp8", "transformer_engine"]
EXPERT_KERNELS = ("auto", "loop", "grouped_mm", "fp8", "transformer_engine")


class ExpertLoRA(NamedTuple):
    """An adapter for each expert.

    Args:
        up_A_LRD: What gate and up share.
        gate_B_LFR: Of the gate.
        up_B_LFR: Of the other factor.
        down_A_LRF: Of the product back to D.
        down_B_LDR: Of the product back to D.
        scale: s.
    """

    up_A_LRD: Tensor
    gate_B_LFR: Tensor
    up_B_LFR: Tensor
    down_A_LRF: Tensor
    down_B_LDR: Tensor
    scale: float


def gated_experts(
    x_AD: Tensor,
    rows: ExpertRows,
    activation: Activation,
    gate_LFD: Stack,
    up_LFD: Stack,
    down_LDF: Stack,
    kernel: Literal["auto", "loop", "grouped_mm", "fp8"] = "auto",
    lora: ExpertLoRA | None = None,
    again: bool = False,
) -> Tensor:
    """Runs gated experts on their rows and sums them per token, ``[A, D] -> [A, D]``.

    Args:
        x_AD: Tokens.
        rows: Which token each row reads, and with what weight.
        activation: Of the gate.
        gate_LFD: Weights of the gate.
        up_LFD: Weights of the other factor.
        down_LDF: Weights back to D.
        kernel: Which way; ``"auto"`` by device and shape. What ``"grouped_mm"`` cannot take (float64, odd widths) goes by loop.
        lora: An adapter of these experts; not for ``"fp8"``.
        again: Whether backward computes the products of gate and up again instead of keeping them.
    """
    adapter, scale = ((), 0.0) if lora is None else (lora[:5], lora.scale)
    if kernel == "fp8":
        products: Products | None = Float8Products(rows.counts_L) if rows.weight_M.shape[0] else None
    else:
        products = choose_products(x_AD, rows, (gate_LFD, *adapter), kernel)
    if products is not None:
        stacks = gate_LFD, up_LFD, down_LDF, *adapter
        return _at_once(x_AD, rows, activation, *stacks, products=products, scale=scale, again=again)
    job = _Job(rows.token_M, rows.distinct, host_counts(rows), activation, scale, again)
    return _ExpertByExpert.apply(x_AD, rows.weight_M, job, gate_LFD, up_LFD, down_LDF, *adapter)


def _keep_bytes(ctx: Any, *stacks: Stack) -> list[Tensor | None]:
    """Keeps stacks that are bytes in ``ctx.coded``, which is None otherwise; returns the others, for ``save_for_backward``."""
    ctx.coded = stacks if isinstance(stacks[0], CodedStack) else None
    return [None if isinstance(stack, CodedStack) else stack for stack in stacks]


# ---- all experts at once ---------------------------------------------------------------------------------------------


def _at_once(
    x_AD: Tensor,
    rows: ExpertRows,
    activation: Activation,
    *stacks: Stack,
    products: Products,
    scale: float = 0.0,
    again: bool = False,
) -> Tensor:
    y_MD = _AtOnce.apply(read_tokens(x_AD, rows), rows.weight_M, products, activation, scale, again, *stacks)
    return sum_rows(y_MD, rows, x_AD.shape[0])


def _gate_and_up(
    products: Products, x_MD: Tensor, gate_LFD: Stack, up_LFD: Stack, z_MR: Tensor | None, adapter: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The two products before the activation; ``z_MR`` is the product with the A they share, times s."""
    gate_MF, up_MF = (products.forward(x_MD, decoded(w_LFD)) for w_LFD in (gate_LFD, up_LFD))
    if z_MR is not None:
        gate_MF.add_(products.forward(z_MR, adapter[1]))
        up_MF.add_(products.forward(z_MR, adapter[2]))
    return gate_MF, up_MF


class _AtOnce(torch.autograd.Function):
    """``down(weight * act(gate) * up)`` of all experts; keeps the two products and makes the rest again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x_MD: Tensor,
        weight_M: Tensor,
        products: Products,
        activation: Activation,
        scale: float,
        again: bool,
        gate_LFD: Stack,
        up_LFD: Stack,
        down_LDF: Stack,
        *adapter: Tensor,
    ) -> Tensor:
        """Computes the weighted rows, ``[M, D] -> [M, D]``."""
        z_MR = products.forward(x_MD, adapter[0]).mul_(scale) if adapter else None
        gate_MF, up_MF = _gate_and_up(products, x_MD, gate_LFD, up_LFD, z_MR, adapter)
        inner_MF = gated_forward(activation, gate_MF, up_MF, weight_M)
        y_MD = products.forward(inner_MF, decoded(down_LDF))
        v_MR = None
        if adapter:
            v_MR = products.forward(inner_MF, adapter[3]).mul_(scale)
            y_MD.add_(products.forward(v_MR, adapter[4]))
        kept = (None, None) if again else (gate_MF, up_MF)
        stacks = _keep_bytes(ctx, gate_LFD, up_LFD, down_LDF)
        ctx.save_for_backward(x_MD, weight_M, *kept, z_MR, v_MR, *stacks, *adapter)
        ctx.products, ctx.activation, ctx.scale = products, activation, scale
        return unchanged(y_MD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Computes the gradients of the rows, their weights and the stacks that need one."""
        x_MD, weight_M, gate_MF, up_MF, z_MR, v_MR, *stacks = ctx.saved_tensors
        (gate_LFD, up_LFD, down_LDF), adapter = ctx.coded or stacks[:3], stacks[3:]
        products, scale = ctx.products, ctx.scale
        if gate_MF is None:
            gate_MF, up_MF = _gate_and_up(products, x_MD, gate_LFD, up_LFD, z_MR, adapter)
        need_x, need_weight, _, _, _, _, need_gate, need_up, need_down, *need_adapter = ctx.needs_input_grad
        grad_MD = grads[0].contiguous()
        grad_inner_MF = products.input_gradient(grad_MD, decoded(down_LDF))
        if adapter:
            up_A, gate_B, up_B, down_A, down_B = adapter
            q_MR = products.input_gradient(grad_MD, down_B).mul_(scale)
            grad_inner_MF = products.input_gradient(q_MR, down_A, grad_inner_MF)
        through = gated_backward(
            ctx.activation, gate_MF, up_MF, weight_M, grad_inner_MF,
            owns_grad=True, wants_weight=need_weight, wants_inner=need_down or any(need_adapter[3:]),
        )  # fmt: skip
        grad_down = grad_gate = grad_up = grad_x = None
        if need_down:
            grad_down = products.weight_gradient(grad_MD, through.inner_MF, down_LDF)
        if need_gate:
            grad_gate = products.weight_gradient(through.gate_MF, x_MD, gate_LFD)
        if need_up:
            grad_up = products.weight_gradient(through.up_MF, x_MD, up_LFD)
        if need_x:
            grad_x = products.input_gradient(through.gate_MF, decoded(gate_LFD))
            grad_x = products.input_gradient(through.up_MF, decoded(up_LFD), grad_x)
        of_adapter: list[Tensor | None] = [None] * len(adapter)
        if adapter:
            grad_z_MR = products.input_gradient(through.gate_MF, gate_B)
            grad_z_MR = products.input_gradient(through.up_MF, up_B, grad_z_MR).mul_(scale)
            if need_x:
                grad_x = products.input_gradient(grad_z_MR, up_A, grad_x)
        if any(need_adapter):
            of_adapter = [
                products.weight_gradient(grad_z_MR, x_MD, up_A),
                products.weight_gradient(through.gate_MF, z_MR, gate_B),
                products.weight_gradient(through.up_MF, z_MR, up_B),
                products.weight_gradient(q_MR, through.inner_MF, down_A),
                products.weight_gradient(grad_MD, v_MR, down_B),
            ]
        return grad_x, through.weight_M, None, None, None, None, grad_gate, grad_up, grad_down, *of_adapter


def _rows_of(x_AD: Tensor, rows: ExpertRows) -> Tensor:
    assert rows.token_M is not None
    return x_AD.index_select(0, rows.token_M)


def _add_rows(y_MD: Tensor, rows: ExpertRows, tokens: int) -> Tensor:
    assert rows.token_M is not None
    if rows.distinct:
        return y_MD.new_empty(tokens, y_MD.shape[1]).index_copy_(0, rows.token_M, y_MD)
    return sum_of_tokens(y_MD, rows.token_M, tokens)


def read_tokens(x_AD: Tensor, rows: ExpertRows) -> Tensor:
    """The token of each row, ``[A, D] -> [M, D]``."""
    if rows.token_M is None:
        return x_AD
    # torch.compile, where it begins in the middle of a layer, loses a symbolic number that the adjoint holds, but not a tensor.
    like_A0 = x_AD.new_empty(x_AD.shape[0], 0)
    return linear(x_AD, lambda x: _rows_of(x, rows), lambda grad: _add_rows(grad, rows, like_A0.shape[0]))


def sum_rows(y_MD: Tensor, rows: ExpertRows, tokens: int) -> Tensor:
    """Sum of each token's rows in at least float32, ``[M, D] -> [A, D]``; zero for tokens that no row reads."""
    if rows.token_M is None:
        return y_MD
    return linear(y_MD, lambda y: unchanged(_add_rows(y, rows, tokens)), lambda grad: _rows_of(grad, rows))


# ---- expert by expert ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """What :class:`_ExpertByExpert` is told besides tensors with gradients."""

    token_M: Tensor | None
    distinct: bool
    counts: list[int]
    activation: Activation
    scale: float = 0.0
    again: bool = False

    def blocks(self, dtype: torch.dtype) -> Iterator[tuple[int, slice, Tensor | slice, bool]]:
        """Experts that have rows, some of their rows, the tokens these read, and whether they are an expert's first."""
        start = 0
        for expert, count in enumerate(self.counts):
            end, size = start + count, count if dtype.itemsize < 4 else ROWS_AT_A_TIME
            for first in range(start, end, max(size, 1)):
                rows = slice(first, min(first + size, end))
                yield expert, rows, rows if self.token_M is None else self.token_M[rows], first == start
            start = end

    def read(self, x_AD: Tensor, tokens: Tensor | slice) -> Tensor:
        return x_AD[tokens] if isinstance(tokens, slice) else x_AD.index_select(0, tokens)

    def gate_and_up(
        self,
        x_cD: Tensor,
        weights: Sequence[Tensor],
        z_cR: Tensor | None,
        adapter: Sequence[Tensor],
        out: Sequence[Tensor | None] = (None, None),
    ) -> list[Tensor]:
        """The two products of an expert before the activation, of its weights and its adapter, if it has one."""
        found = [torch.mm(x_cD, w.t(), out=o) for w, o in zip(weights, out, strict=True)]
        if z_cR is not None:
            for product, factor in zip(found, adapter[1:3], strict=True):
                product.addmm_(z_cR, factor.t(), alpha=self.scale)
        return found

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


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """Adds ``a b`` to ``total``, or writes it there, whatever stood there, if it is the first."""
    if first:
        torch.mm(a, b, out=total)
    else:
        total.addmm_(a, b)


class _ExpertByExpert(torch.autograd.Function):
    """Gradients go straight into the stacks: indexing a stack under autograd would write a full-size one per expert."""

    @staticmethod
    def forward(
        ctx: Any,
        x_AD: Tensor,
        weight_M: Tensor,
        job: _Job,
        gate_LFD: Stack,
        up_LFD: Stack,
        down_LDF: Stack,
        *adapter: Tensor,
    ) -> Tensor:
        """Computes the experts one after the other and sums their rows per token, ``[A, D] -> [A, D]``."""
        kept: list[Tensor | None] = [None, None]
        if not job.again:
            kept = [FOR_BACKWARD.empty(x_AD, weight_M.shape[0], gate_LFD.shape[1]) for _ in range(2)]
        z_MR = v_MR = None
        if adapter:
            z_MR, v_MR = (x_AD.new_empty(weight_M.shape[0], adapter[a].shape[1]) for a in (0, 3))
        total_AD = job.total(x_AD)
        for expert, rows, tokens, _ in job.blocks(x_AD.dtype):
            x_cD, z_cR = job.read(x_AD, tokens), None
            weights, factors = [stack[expert] for stack in (gate_LFD, up_LFD)], [stack[expert] for stack in adapter]
            if z_MR is not None:
                z_cR = torch.mm(x_cD, factors[0].t(), out=z_MR[rows])
            out = [None if whole is None else whole[rows] for whole in kept]
            gate, up = job.gate_and_up(x_cD, weights, z_cR, factors, out)
            inner_cF = job.activation(gate).mul_(up)
            y_cD = inner_cF @ down_LDF[expert].t()
            if v_MR is not None:
                down_A, down_B = factors[3:]
                y_cD.addmm_(torch.mm(inner_cF, down_A.t(), out=v_MR[rows]), down_B.t(), alpha=job.scale)
            job.add(total_AD, tokens, y_cD.mul_(weight_M[rows].unsqueeze(1)))
        stacks = _keep_bytes(ctx, gate_LFD, up_LFD, down_LDF)
        ctx.save_for_backward(x_AD, weight_M, *kept, z_MR, v_MR, *stacks, *adapter)
        ctx.job = job
        return total_AD.to(x_AD.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Computes the gradients of the tokens, the rows' weights and the stacks that need one, one expert after the other."""
        x_AD, weight_M, gate_MF, up_MF, z_MR, v_MR, *stacks = ctx.saved_tensors
        (gate_LFD, up_LFD, down_LDF), adapter = ctx.coded or stacks[:3], stacks[3:]
        job: _Job = ctx.job
        need_x, need_weight, _, *need_stacks = ctx.needs_input_grad
        grad_AD, total_AD = grads[0], job.total(x_AD) if need_x else None
        grad_weight = torch.empty_like(weight_M) if need_weight else None
        grad_gate, grad_up, grad_down = (
            job.stack_like(w) if needed else None
            for w, needed in zip((gate_LFD, up_LFD, down_LDF), need_stacks[:3], strict=True)
        )
        trains_adapter = any(need_stacks[3:])
        of_adapter: list[Any] = [job.stack_like(w) if trains_adapter else None for w in adapter]
        for expert, rows, tokens, first in job.blocks(x_AD.dtype):
            grad_cD, weight_c1 = job.read(grad_AD, tokens), weight_M[rows].unsqueeze(1)
            grad_inner = grad_cD @ down_LDF[expert]
            if adapter:
                up_A, gate_B, up_B, down_A, down_B = (stack[expert] for stack in adapter)
                q_cR = grad_cD @ down_B
                grad_inner.addmm_(q_cR, down_A, alpha=job.scale)
            if gate_MF is None:
                z_cR = z_MR[rows] if adapter else None
                weights, factors = (gate_LFD[expert], up_LFD[expert]), [stack[expert] for stack in adapter]
                gate, up = job.gate_and_up(job.read(x_AD, tokens), weights, z_cR, factors)
            else:
                gate, up = gate_MF[rows], up_MF[rows]
            active = job.activation(gate)
            inner = active * up
            if grad_weight is not None:
                grad_weight[rows] = torch.linalg.vecdot(inner.to(weight_M.dtype), grad_inner.to(weight_M.dtype))
            if grad_down is not None:
                weighted_cD = torch.mul(grad_cD, weight_c1, out=torch.empty_like(grad_cD))
                _add_product(grad_down[expert], weighted_cD.t(), inner, first)
            if trains_adapter:  # the weight of a row and s multiply what is short
                factor_c1 = weight_c1 * job.scale
                _add_product(of_adapter[3][expert], q_cR.mul_(factor_c1).t(), inner, first)
                _add_product(of_adapter[4][expert], grad_cD.t(), v_MR[rows].clone().mul_(factor_c1), first)
            grad_inner.mul_(weight_c1)
            grad_up_cF = active.mul_(grad_inner)
            grad_gate_cF = through_activation(job.activation, gate, grad_inner.mul_(up))
            if grad_gate is not None or grad_up is not None or trains_adapter:
                x_cD = job.read(x_AD, tokens)
            if grad_gate is not None:
                _add_product(grad_gate[expert], grad_gate_cF.t(), x_cD, first)
            if grad_up is not None:
                _add_product(grad_up[expert], grad_up_cF.t(), x_cD, first)
            if adapter:
                grad_z_cR = torch.mm(grad_gate_cF, gate_B).addmm_(grad_up_cF, up_B).mul_(job.scale)
            if trains_adapter:
                z_cR = z_MR[rows] * job.scale
                _add_product(of_adapter[0][expert], grad_z_cR.t(), x_cD, first)
                _add_product(of_adapter[1][expert], grad_gate_cF.t(), z_cR, first)
                _add_product(of_adapter[2][expert], grad_up_cF.t(), z_cR, first)
            if total_AD is not None:
                grad_x_cD = torch.mm(grad_gate_cF, gate_LFD[expert]).addmm_(grad_up_cF, up_LFD[expert])
                job.add(total_AD, tokens, grad_x_cD.addmm_(grad_z_cR, up_A) if adapter else grad_x_cD)
        grad_x = None if total_AD is None else total_AD.to(x_AD.dtype)
        return grad_x, grad_weight, None, grad_gate, grad_up, grad_down, *of_adapter

# SPDX-License-Identifier: Apache-2.0
"""The routed experts of a layer, stored as stacks with an expert axis.

Legend: M rows in expert order, L local experts, D hidden size, F expert width (cut over etp).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_moefold.fold import Fold
from lightning_moefold.layout import Cut, Family, ParameterPlan, TensorGradient, even_split
from lightning_moefold.modules.base import ParallelModule, local
from lightning_moefold.modules.mlp import ACTIVATIONS

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Activation = Callable[[Tensor], Tensor]


class RoutedExperts(ParallelModule):
    """The experts of a layer: parameters of the EXPERT family with an expert axis first.

    Args:
        num_experts: E, spread evenly over ep.
    """

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts

    def check(self, fold: Fold) -> None:
        """Raises :class:`FoldError` if the experts do not spread evenly over ep."""
        fold.check_experts(self.num_experts)

    def forward(self, x_MD: Tensor, counts_L: Tensor) -> Tensor:
        """``[M, D] -> [M, D]``, partial over etp.

        Args:
            x_MD: Rows in expert order.
            counts_L: Rows of each local expert, int64; their sum is M.
        """
        raise NotImplementedError


class Experts(RoutedExperts):
    """E gated feed-forward experts: ``down(act(gate(x)) * up(x))``, each on its own rows.

    Args:
        hidden_size: D.
        num_experts: E, spread evenly over ep.
        ffn_hidden_size: F.
        activation: A name in :data:`~.mlp.ACTIVATIONS`.
    """

    def __init__(self, hidden_size: int, num_experts: int, ffn_hidden_size: int, activation: str = "silu") -> None:
        super().__init__(num_experts)
        self.ffn_hidden_size = ffn_hidden_size
        self.activation = ACTIVATIONS[activation]
        self.gate_proj = nn.Parameter(torch.empty(num_experts, ffn_hidden_size, hidden_size))
        self.up_proj = nn.Parameter(torch.empty(num_experts, ffn_hidden_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, ffn_hidden_size))
        for weight in (self.gate_proj, self.up_proj, self.down_proj):
            nn.init.normal_(weight, std=0.02)

    def plans(self, fold: Fold) -> dict[str, ParameterPlan]:
        """Experts over ep, their width over etp."""
        self.check(fold)
        fold.check_width("etp", "ffn_hidden_size", self.ffn_hidden_size)
        experts = Cut("ep", 0, even_split(self.num_experts, fold.ep))
        widths = even_split(self.ffn_hidden_size, fold.etp)
        wide, narrow = (
            ParameterPlan(Family.EXPERT, (experts, Cut("etp", dim, widths)), TensorGradient.SHARDED) for dim in (1, 2)
        )
        return {"gate_proj": wide, "up_proj": wide, "down_proj": narrow}

    def forward(self, x_MD: Tensor, counts_L: Tensor) -> Tensor:
        """See :meth:`RoutedExperts.forward`."""
        weights = [local(self.gate_proj), local(self.up_proj), local(self.down_proj)]
        if torch.is_autocast_enabled(x_MD.device.type):  # outside a language model; autocast knows no custom function
            dtype = torch.get_autocast_dtype(x_MD.device.type)
            x_MD, weights = x_MD.to(dtype), [w.to(dtype) for w in weights]
        if _kernel_takes(x_MD, weights[0]):
            return _grouped(x_MD, counts_L, self.activation, *weights)
        return _ExpertByExpert.apply(x_MD, counts_L.tolist(), self.activation, *weights)


def _kernel_takes(x_MD: Tensor, weight_LFD: Tensor) -> bool:
    """The grouped kernel is for CUDA; it has no float64, and rows of all operands must be multiples of 16 bytes."""
    aligned = all(n * x_MD.element_size() % 16 == 0 for n in weight_LFD.shape[1:])
    return x_MD.is_cuda and x_MD.dtype in _KERNEL_DTYPES and aligned and x_MD.shape[0] > 0


def _grouped(x_MD: Tensor, counts_L: Tensor, activation: Activation, *weights: Tensor) -> Tensor:
    """All experts in one kernel per product; the counts stay on the device."""
    ends_L = counts_L.cumsum(0).to(torch.int32)
    gate_LFD, up_LFD, down_LDF = weights
    gate_MF, up_MF = (F.grouped_mm(x_MD, w_LFD.transpose(1, 2), offs=ends_L) for w_LFD in (gate_LFD, up_LFD))
    return _GroupedDown.apply(gate_MF, up_MF, down_LDF, ends_L, activation)


class _GroupedDown(torch.autograd.Function):
    """``down(act(gate) * up)`` of all experts; keeps the two factors (``2F`` numbers per row), makes the rest again."""

    @staticmethod
    def forward(
        ctx: Any, gate_MF: Tensor, up_MF: Tensor, down_LDF: Tensor, ends_L: Tensor, activation: Activation
    ) -> Tensor:
        ctx.save_for_backward(gate_MF, up_MF, down_LDF, ends_L)
        ctx.activation = activation
        return F.grouped_mm(activation(gate_MF).mul_(up_MF), down_LDF.transpose(1, 2), offs=ends_L)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate_MF, up_MF, down_LDF, ends_L = ctx.saved_tensors
        grad_y = grads[0].contiguous()
        grad_inner = F.grouped_mm(grad_y, down_LDF, offs=ends_L)
        inner, slope_gate, slope_up = _slopes(gate_MF, up_MF, grad_inner, ctx.activation)
        grad_down = F.grouped_mm(grad_y.t(), inner, offs=ends_L) if ctx.needs_input_grad[2] else None
        return slope_gate, slope_up, grad_down, None, None


class _ExpertByExpert(torch.autograd.Function):
    """One expert after the other, forward and backward.

    So an expert's activations are still in the cache when they are used. Keeps the rows and the two products before the
    activation (``D + 2F`` numbers per row), and makes the rest again in backward. Gradients go straight into the stacks:
    indexing a stack under autograd would write a full-size gradient for every expert.
    """

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, counts: list[int], activation: Activation, *weights: Tensor) -> Tensor:
        gate_LFD, up_LFD, down_LDF = weights
        gate_MF = x_MD.new_empty((x_MD.shape[0], gate_LFD.shape[1]))
        up_MF, y_MD = torch.empty_like(gate_MF), torch.empty_like(x_MD)
        for expert, rows in _blocks(counts):
            gate, up = gate_MF[rows], up_MF[rows]
            torch.mm(x_MD[rows], gate_LFD[expert].t(), out=gate)
            torch.mm(x_MD[rows], up_LFD[expert].t(), out=up)
            torch.mm(activation(gate).mul_(up), down_LDF[expert].t(), out=y_MD[rows])
        ctx.save_for_backward(x_MD, gate_MF, up_MF, *weights)
        ctx.counts, ctx.activation = counts, activation
        return y_MD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_MD, gate_MF, up_MF, gate_LFD, up_LFD, down_LDF = ctx.saved_tensors
        need_x, need_gate, need_up, need_down = (ctx.needs_input_grad[i] for i in (0, 3, 4, 5))
        grad_y, grad_x = grads[0].contiguous(), torch.empty_like(x_MD) if need_x else None
        stacks = (gate_LFD, up_LFD, down_LDF)
        wanted = (need_gate, need_up, need_down)
        # Experts without rows are never visited below: their gradient is zero.
        grad_gate, grad_up, grad_down = (
            torch.zeros_like(w) if n and 0 in ctx.counts else torch.empty_like(w) if n else None
            for w, n in zip(stacks, wanted, strict=True)
        )
        for expert, rows in _blocks(ctx.counts):
            inner, slope_gate, slope_up = _slopes(
                gate_MF[rows], up_MF[rows], grad_y[rows] @ down_LDF[expert], ctx.activation
            )
            if grad_down is not None:
                torch.mm(grad_y[rows].t(), inner, out=grad_down[expert])
            if grad_gate is not None:
                torch.mm(slope_gate.t(), x_MD[rows], out=grad_gate[expert])
            if grad_up is not None:
                torch.mm(slope_up.t(), x_MD[rows], out=grad_up[expert])
            if grad_x is not None:
                torch.mm(slope_gate, gate_LFD[expert], out=grad_x[rows]).addmm_(slope_up, up_LFD[expert])
        return grad_x, None, None, grad_gate, grad_up, grad_down


def _blocks(counts: list[int]) -> Iterator[tuple[int, slice]]:
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


def _slopes(gate: Tensor, up: Tensor, grad_inner: Tensor, activation: Activation) -> tuple[Tensor, Tensor, Tensor]:
    """The inner product again, and the gradients with respect to its two factors before the activation."""
    with torch.enable_grad():
        leaf = gate.detach().requires_grad_()
        active = activation(leaf)
    inner, slope_up = active.detach() * up, active.detach() * grad_inner
    (slope_gate,) = torch.autograd.grad(active, leaf, grad_inner.mul_(up))
    return inner, slope_gate, slope_up

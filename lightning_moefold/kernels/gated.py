# SPDX-License-Identifier: Apache-2.0
"""``weight * act(gate) * up`` of gated feed-forward layers, forward and backward.

Both directions are memory-bound. A fused pass reads 2 and writes 1 number per element in forward, and reads 3 and
writes 3 in backward; PyTorch's separate operations move about three times as much.

Legend: M rows, F width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_moefold.kernels.availability import runs_triton
from lightning_moefold.kernels.compiled import unchanged

if TYPE_CHECKING:
    Activation = Callable[[Tensor], Tensor]


class GatedGradients(NamedTuple):
    """Gradients of a gated product.

    Args:
        gate_MF: Gradient of the gate, the input of the activation.
        up_MF: Gradient of the other factor.
        weight_M: Gradient of the row weights; None if not requested.
        inner_MF: The recomputed forward result, which the gradient of the next weight matrix needs; None if not
            requested.
    """

    gate_MF: Tensor
    up_MF: Tensor
    weight_M: Tensor | None
    inner_MF: Tensor | None


def gated(activation: Activation, gate_MF: Tensor, up_MF: Tensor, weight_M: Tensor | None = None) -> Tensor:
    """Computes ``weight * act(gate) * up`` in the dtype of ``gate``. Differentiable; keeps only its inputs for backward.

    Args:
        activation: Activation function of the gate.
        gate_MF: Input of the activation, ``[..., F]``; ``[M, F]`` if there are row weights.
        up_MF: The other factor, of the same shape.
        weight_M: Weight of each row, in at least float32; None for 1.
    """
    return _Gated.apply(gate_MF, up_MF, weight_M, activation)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_MF: Tensor, up_MF: Tensor, weight_M: Tensor | None, activation: Activation) -> Tensor:
        ctx.save_for_backward(gate_MF, up_MF, weight_M)
        ctx.activation = activation
        return unchanged(gated_forward(activation, gate_MF, up_MF, weight_M))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate_MF, up_MF, weight_M = ctx.saved_tensors
        through = gated_backward(
            ctx.activation, gate_MF, up_MF, weight_M, grads[0].contiguous(),
            owns_grad=False, wants_weight=ctx.needs_input_grad[2],
        )  # fmt: skip
        return through.gate_MF, through.up_MF, through.weight_M, None


def gated_forward(activation: Activation, gate_MF: Tensor, up_MF: Tensor, weight_M: Tensor | None = None) -> Tensor:
    """Computes ``weight * act(gate) * up`` in the dtype of ``gate``; without ``weight``, ``act(gate) * up``."""
    if activation is F.silu and _fuses(gate_MF, up_MF, weight_M):
        from lightning_moefold.kernels import gated_triton

        return gated_triton.forward(gate_MF, up_MF, weight_M)
    inner_MF = activation(gate_MF).mul_(up_MF)
    return inner_MF if weight_M is None else inner_MF.mul_(weight_M.unsqueeze(1))


def gated_backward(
    activation: Activation,
    gate_MF: Tensor,
    up_MF: Tensor,
    weight_M: Tensor | None,
    grad_MF: Tensor,
    *,
    owns_grad: bool,
    wants_weight: bool = False,
    wants_inner: bool = False,
) -> GatedGradients:
    """Computes the gradients of :func:`gated_forward`.

    Args:
        activation: Activation function of the gate, as in forward.
        gate_MF: Input of the activation, as in forward.
        up_MF: The other factor, as in forward.
        weight_M: Weight of each row, as in forward; None for 1.
        grad_MF: Gradient of the forward result.
        owns_grad: Whether ``grad_MF`` may be overwritten, because the caller does not use it again.
        wants_weight: Whether to compute the gradient of ``weight_M``.
        wants_inner: Whether to recompute the forward result.
    """
    if activation is F.silu and _fuses(gate_MF, up_MF, weight_M) and grad_MF.is_contiguous():
        from lightning_moefold.kernels import gated_triton

        return gated_triton.backward(gate_MF, up_MF, weight_M, grad_MF, owns_grad, wants_weight, wants_inner)
    if not owns_grad:
        grad_MF = grad_MF.clone()
    active_MF = activation(gate_MF)
    inner_MF, grad_weight = active_MF * up_MF, None
    if wants_weight and weight_M is not None:
        grad_weight = torch.linalg.vecdot(inner_MF.to(weight_M.dtype), grad_MF.to(weight_M.dtype))
    if weight_M is not None:
        grad_MF.mul_(weight_M.unsqueeze(1))
        inner_MF.mul_(weight_M.unsqueeze(1))
    grad_up = active_MF.mul_(grad_MF)
    grad_gate = through_activation(activation, gate_MF, grad_MF.mul_(up_MF))
    return GatedGradients(grad_gate, grad_up, grad_weight, inner_MF if wants_inner else None)


def through_activation(activation: Activation, gate_MF: Tensor, grad_MF: Tensor) -> Tensor:
    """Computes the gradient with respect to the activation's input; for SiLU in one pass."""
    if activation is F.silu:
        return torch.ops.aten.silu_backward(grad_MF, gate_MF)
    with torch.enable_grad():
        leaf = gate_MF.detach().requires_grad_()
        active = activation(leaf)
    return torch.autograd.grad(active, leaf, grad_MF)[0]


def _fuses(gate_MF: Tensor, up_MF: Tensor, weight_M: Tensor | None) -> bool:
    tensors = (gate_MF, up_MF) if weight_M is None else (gate_MF, up_MF, weight_M)
    return runs_triton(*tensors) and gate_MF.dim() == 2 and gate_MF.is_contiguous() and up_MF.is_contiguous()

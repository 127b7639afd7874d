# SPDX-License-Identifier: Apache-2.0
"""Transformer Engine's grouped products for experts, with its FP8 recipes. Imported only where somebody asks for it.

The weights stay in our stacks: ``GroupedLinear`` modules without storage lend their forward and backward, and are called
with slices of the stacks as their parameters. Inside ``transformer_engine.pytorch.autocast`` they compute in FP8 by whatever
recipe that names, between rows that are padded once per expert to what its kernels take.

Where a token has several rows, Transformer Engine's fused permutation reads and sums them: by mask, because our rows name
their tokens and a token may have any number of them. It sums in float32, in a fixed order, and in no more memory than the
result. Its weighted variants are not used: one would keep every expert's output for backward, the other
leaves out the tokens of rows of weight zero and with them the gradients of these weights. Nor is the variant that pads, which
waits for the device twice. Where each row is a token's only one there is nothing to sum, and rows are copied.

Weights multiply rows as in :mod:`.experts.kernels`: before the product back to D, with the result in the dtype of the rows.

For Transformer Engine 2.9 and newer. Tested against a stub of the interfaces of 2.9 and 2.20.0.dev0
(``tests/modules/experts/te_stub.py``), **not run on a GPU yet**. Costs one more wait of the host per layer, for the rows of
each expert.

Legend: A tokens, M rows in expert order, P padded rows, L local experts, D hidden size, F expert width, I and O widths in
and out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lightning_moefold.dispatch import ExpertRows
from lightning_moefold.dispatch.base import expert_of_rows
from lightning_moefold.dispatch.permutation import take_distinct
from lightning_moefold.errors import InputError
from lightning_moefold.kernels import gated
from lightning_moefold.mesh import FoldedMesh
from lightning_moefold.modules.experts.kernels import Activation, read_tokens, sum_rows


@cache
def load() -> Any:
    """``transformer_engine.pytorch``.

    Raises:
        RuntimeError: Where it is not installed, too old, or not for this machine; its import then fails in many ways, not
            only with ImportError.
    """
    try:
        import transformer_engine.pytorch as te
        import transformer_engine.pytorch.quantization  # noqa: F401  (2.9 brought it)
    except Exception as error:
        raise RuntimeError(
            "expert_kernel='transformer_engine' needs Transformer Engine 2.9 or newer and a CUDA device; install the extra "
            "[te], or use 'auto'."
        ) from error
    return te


def check_recipe(mesh: FoldedMesh | None) -> None:
    """Checks that ranks agree on scales within their pipeline stage only, as other stages are in other passes.

    With delayed scaling, Transformer Engine's ``autocast`` takes the largest values of all ranks of a group, by default the world.

    Raises:
        InputError: If the group is another one than the stage's.
    """
    quantization = sys.modules.get("transformer_engine.pytorch.quantization")
    if mesh is None or mesh.fold.pp == 1 or quantization is None:
        return
    state = quantization.FP8GlobalStateManager
    if not state.is_fp8_enabled():
        return
    recipe, group = state.get_fp8_recipe(), state.get_fp8_group()
    if recipe.delayed() and recipe.reduce_amax and (group is None or group is not mesh.stage.group):
        raise InputError(
            "in a pipeline, delayed scaling would wait for ranks of other stages; give Transformer Engine's autocast "
            "amax_reduction_group=trainer.strategy.mesh.stage.group, or recipe=DelayedScaling(reduce_amax=False) or "
            "Float8CurrentScaling()."
        )


class TransformerEngineExperts:
    """The three products of gated experts, with widths of this rank.

    One for each layer and chunk of experts, because recipes keep their scales here.
    """

    def __init__(self, experts: int, hidden_size: int, width: int, dtype: torch.dtype) -> None:
        te = load()
        self._te, self._experts = te, experts
        self._gate, self._up, self._down = (
            te.GroupedLinear(experts, *sizes, bias=False, params_dtype=dtype, device="meta")
            for sizes in ((hidden_size, width), (hidden_size, width), (width, hidden_size))
        )

    def __call__(self, x_AD: Tensor, rows: ExpertRows, activation: Activation, *weights: Tensor) -> Tensor:
        """As :func:`~.kernels.gated_experts`."""
        counts = rows.counts_L.tolist() if rows.counts is None else rows.counts
        several = rows.token_M is not None and not rows.distinct and rows.weight_M.shape[0] > 0
        if not several:
            y_MD = self._rows(read_tokens(x_AD, rows), rows.weight_M, counts, activation, *weights)
            return sum_rows(y_MD, rows, x_AD.shape[0])
        mask_AL, order_M = _mask(rows, x_AD.shape[0])
        x_MD, places = self._te.moe_permute(x_AD, mask_AL, num_out_tokens=order_M.shape[0], map_type="mask")
        y_MD = self._rows(x_MD, take_distinct(rows.weight_M, order_M), counts, activation, *weights)
        return self._te.moe_unpermute(y_MD, places, restore_shape=x_AD.shape, map_type="mask")

    def _rows(
        self,
        x_MD: Tensor,
        weight_M: Tensor,
        counts: list[int],
        activation: Activation,
        gate_LFD: Tensor,
        up_LFD: Tensor,
        down_LDF: Tensor,
    ) -> Tensor:
        padded, fp8 = counts, self._te.quantization.FP8GlobalStateManager.is_fp8_enabled()
        if fp8:
            _check_widths(*up_LFD.shape[1:])
            # Rows of zeros with weight zero: so they are until the end, and have no gradient.
            pad = self._te.Fp8Padding(self._experts)
            x_MD, padded = pad(x_MD, counts)
            weight_M = pad(weight_M.unsqueeze(1), counts)[0].squeeze(1)
        gate_PF, up_PF = (
            _product(lender, x_MD, stack, padded) for lender, stack in ((self._gate, gate_LFD), (self._up, up_LFD))
        )
        y_PD = _product(self._down, gated(activation, gate_PF, up_PF, weight_M), down_LDF, padded)
        return self._te.Fp8Unpadding(self._experts)(y_PD, counts) if fp8 else y_PD


def _check_widths(width: int, hidden_size: int) -> None:
    if width % 16 or hidden_size % 16:
        raise InputError(
            f"hidden_size={hidden_size} and ffn_hidden_size={width} on each rank must divide by 16 in FP8 (MXFP8: by 32), as its "
            "kernels take them; use other sizes, a smaller etp, or no autocast of Transformer Engine."
        )


def _mask(rows: ExpertRows, tokens: int) -> tuple[Tensor, Tensor]:
    """Which experts each token goes to, int32 ``[A, L]``; and our rows in the order of a mask, by expert and then token."""
    assert rows.token_M is not None
    experts = rows.counts_L.shape[0]
    expert_M = expert_of_rows(rows.counts_L.unsqueeze(0), rows.token_M.shape[0])
    mask_AL = torch.zeros(tokens, experts, dtype=torch.int32, device=expert_M.device)
    mask_AL.view(-1).scatter_(0, rows.token_M * experts + expert_M, 1)
    return mask_AL, (expert_M * tokens + rows.token_M).argsort()


def _product(lender: Any, x_PI: Tensor, weight_LOI: Tensor, counts: list[int]) -> Tensor:
    weights = {f"weight{i}": weight_OI for i, weight_OI in enumerate(_Slices.apply(weight_LOI))}
    return torch.func.functional_call(lender, weights, (x_PI, counts))


class _Slices(torch.autograd.Function):
    """``unbind``, without a copy of all gradients where those are slices of one tensor, as newer versions make them."""

    @staticmethod
    def forward(ctx: Any, weight_LOI: Tensor) -> tuple[Tensor, ...]:
        return weight_LOI.unbind(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        whole = grads[0]._base
        if whole is not None and whole.shape == (len(grads), *grads[0].shape) and whole.is_contiguous():
            addresses = [part.data_ptr() for part in whole]
            if addresses == [grad.data_ptr() for grad in grads] and all(grad.is_contiguous() for grad in grads):
                return whole
        return torch.stack(grads)


# ---- what runs again in backward -------------------------------------------------------------------------------------


def recipe_contexts() -> tuple[AbstractContextManager[Any], Callable[[], AbstractContextManager[Any]]]:
    """Around a part's forward, and around the same part each time backward runs it again, then often outside ``autocast``.

    As Transformer Engine's own ``checkpoint`` does it: the second time in the same recipe and, with delayed scaling, with
    the scales of the first.
    """
    quantization = sys.modules.get("transformer_engine.pytorch.quantization")
    if quantization is None or not quantization.FP8GlobalStateManager.is_fp8_enabled():
        return nullcontext(), nullcontext
    state, phase = quantization.FP8GlobalStateManager, load().distributed.activation_recompute_forward
    recipe, group = state.get_fp8_recipe(), state.get_fp8_group()

    @contextmanager
    def again() -> Iterator[None]:
        with (
            phase(activation_recompute=True, recompute_phase=True),
            quantization.autocast(enabled=True, recipe=recipe, amax_reduction_group=group),
        ):
            yield

    return phase(activation_recompute=True, recompute_phase=False), again

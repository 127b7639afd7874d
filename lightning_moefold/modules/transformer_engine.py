# SPDX-License-Identifier: Apache-2.0
"""Transformer Engine's grouped products for experts, with its FP8 recipes. Imported only where somebody asks for it.

The weights stay in our stacks: ``GroupedLinear`` modules without storage lend their forward and backward, and are called
with slices of the stacks as their parameters. Inside ``transformer_engine.pytorch.autocast`` they compute in FP8 by whatever
recipe that names; the rows of each expert are then padded to what the kernels take.

Written against Transformer Engine 2.20. Costs one more wait of the host per layer, for the rows of each expert.

Legend: M rows in expert order, L local experts, D hidden size, F expert width, I and O widths in and out.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from lightning_moefold.dispatch import ExpertRows
from lightning_moefold.modules.expert_kernels import Activation, read_tokens, sum_rows


@cache
def load() -> Any:
    """``transformer_engine.pytorch``.

    Raises:
        RuntimeError: Where it is not installed, or not for this machine; its import then fails in many ways, not only with
            ImportError.
    """
    try:
        import transformer_engine.pytorch as te
    except Exception as error:
        raise RuntimeError(
            "expert_kernel='transformer_engine' needs Transformer Engine and a CUDA device; install the extra [te], or use 'auto'."
        ) from error
    return te


class TransformerEngineExperts:
    """The three products of a layer's gated experts. One for each layer, because recipes keep their scales here.

    Args:
        experts: L.
        hidden_size: D.
        width: F of this rank.
        dtype: Of the weights.
    """

    def __init__(self, experts: int, hidden_size: int, width: int, dtype: torch.dtype) -> None:
        te = load()
        self._te, self._experts = te, experts
        self._gate, self._up, self._down = (
            te.GroupedLinear(experts, *sizes, bias=False, params_dtype=dtype, device="meta")
            for sizes in ((hidden_size, width), (hidden_size, width), (width, hidden_size))
        )

    def __call__(self, x_AD: Tensor, rows: ExpertRows, activation: Activation, *weights: Tensor) -> Tensor:
        """As :func:`~.expert_kernels.gated_experts`."""
        counts = rows.counts_L.tolist() if rows.counts is None else rows.counts
        gate, up, down = weights
        x_MD = read_tokens(x_AD, rows)
        inner_MF = activation(self._product(self._gate, x_MD, gate, counts)) * self._product(self._up, x_MD, up, counts)
        weighted_MF = (inner_MF * rows.weight_M.unsqueeze(1)).to(inner_MF.dtype)
        return sum_rows(self._product(self._down, weighted_MF, down, counts), rows, x_AD.shape[0])

    def _product(self, lender: Any, x_MI: Tensor, weight_LOI: Tensor, counts: list[int]) -> Tensor:
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager

        weights = {f"weight{i}": weight for i, weight in enumerate(weight_LOI.unbind(0))}
        if not FP8GlobalStateManager.is_fp8_enabled():
            return torch.func.functional_call(lender, weights, (x_MI, counts))
        x_MI, padded = self._te.Fp8Padding(self._experts)(x_MI, counts)
        return self._te.Fp8Unpadding(self._experts)(torch.func.functional_call(lender, weights, (x_MI, padded)), counts)

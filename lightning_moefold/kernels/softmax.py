# SPDX-License-Identifier: Apache-2.0
"""The two passes of a cross-entropy over logits that may be cut over ranks along the vocabulary.

Legend: C rows, v size of this rank's part of the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_moefold.kernels.availability import runs_triton


def row_statistics(logits_Cv: Tensor, target_C: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Computes each row's terms of the loss, and the tensor from which :func:`softmax_slope` continues.

    Args:
        logits_Cv: Logits; they may be overwritten.
        target_C: Column of each row's target. Outside of ``0..v-1`` another rank holds it, and the target's logit is 0
            here.
        dtype: Data type of the computation.

    Returns:
        The maximum, the sum of ``exp(logit - maximum)`` and the target's logit of each row, ``[3, C]``; and either the
        logits (fused) or the exponentials, so that these are computed once.
    """
    if fuses_softmax(logits_Cv, dtype):
        from lightning_moefold.kernels import softmax_triton

        return softmax_triton.statistics(logits_Cv, target_C), logits_Cv
    wide_Cv, size = logits_Cv.to(dtype), logits_Cv.shape[1]
    if size == 0:  # a tp rank without any part of a small vocabulary
        nothing = torch.zeros(target_C.shape, dtype=dtype, device=logits_Cv.device)
        return torch.stack((torch.full_like(nothing, float("-inf")), nothing, nothing)), wide_Cv
    top_C = wide_Cv.amax(-1)
    picked_C = wide_Cv.gather(1, target_C.clamp(0, size - 1).unsqueeze(1)).squeeze(1)
    picked_C = picked_C.masked_fill(~_held(target_C, size), 0)
    sum_C = wide_Cv.sub_(top_C.unsqueeze(-1)).exp_().sum(-1)
    return torch.stack((top_C, sum_C, picked_C)), wide_Cv


def softmax_slope(kept_Cv: Tensor, target_C: Tensor, top_C: Tensor, log_sum_C: Tensor, scale_C: Tensor) -> Tensor:
    """Computes the gradient of ``scale * loss`` with respect to the logits, ``scale * (softmax - target)``.

    Args:
        kept_Cv: Second result of :func:`row_statistics`; it is overwritten.
        target_C: Column of each row's target, as in :func:`row_statistics`.
        top_C: Maximum of each row on this rank.
        log_sum_C: Logarithm of the sum of exponentials over the whole vocabulary.
        scale_C: Weight of each row, in the dtype of the computation.
    """
    if fuses_softmax(kept_Cv, scale_C.dtype):
        from lightning_moefold.kernels import softmax_triton

        return softmax_triton.slope_(kept_Cv, target_C, log_sum_C, scale_C)
    slope_Cv, size = kept_Cv.mul_(((top_C - log_sum_C).exp() * scale_C).unsqueeze(-1)), kept_Cv.shape[1]
    if size:
        weight_C1 = (scale_C * _held(target_C, size)).neg().unsqueeze(1)
        slope_Cv.scatter_add_(1, target_C.clamp(0, size - 1).unsqueeze(1), weight_C1)
    return slope_Cv


def fuses_softmax(logits_Cv: Tensor, dtype: torch.dtype) -> bool:
    """Whether both passes use Triton kernels, which compute in float32."""
    return dtype == torch.float32 and logits_Cv.shape[1] > 0 and logits_Cv.is_contiguous() and runs_triton(logits_Cv)


def _held(target_C: Tensor, size: int) -> Tensor:
    return (target_C >= 0) & (target_C < size)

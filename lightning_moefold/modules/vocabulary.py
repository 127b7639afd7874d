# SPDX-License-Identifier: Apache-2.0
"""Embedding and output head, cut over the vocabulary, and a cross-entropy that never holds all logits.

The vocabulary is split like ``torch.chunk``, so tp need not divide it and nothing is padded in storage.

Legend: N tokens of the rows on this rank, T tokens of this tp rank, C rows of a chunk, D hidden size, V vocabulary, v
local part of it, G tp ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_moefold import comm
from lightning_moefold.fold import Fold
from lightning_moefold.kernels import row_statistics, softmax_slope
from lightning_moefold.layout import Cut, ParameterPlan, TensorGradient, chunk_split
from lightning_moefold.mesh import Axis
from lightning_moefold.modules.base import ParallelModule, local, wide
from lightning_moefold.modules.logit_chunks import chunk_rows
from lightning_moefold.modules.sequence import SequenceBatch


class _VocabularyParallel(ParallelModule):
    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        nn.init.normal_(self.weight, std=0.02)

    def plans(self, fold: Fold) -> dict[str, ParameterPlan]:
        """Rows of the vocabulary."""
        cut = Cut("tp", 0, chunk_split(self.vocab_size, fold.tp))
        return {"weight": ParameterPlan(cuts=(cut,), gradient=TensorGradient.SHARDED)}

    @property
    def _sizes(self) -> tuple[int, ...]:
        return chunk_split(self.vocab_size, self.tp.size)

    @property
    def _first(self) -> int:
        return sum(self._sizes[: self.tp.index])


class VocabularyEmbedding(_VocabularyParallel):
    """Token embedding with a weight ``[V, D]``.

    Args:
        vocab_size: Number of tokens in the vocabulary, V.
        hidden_size: Size of hidden states, D.
        padding_idx: Token whose row gets no gradient (as in ``torch.nn.Embedding``).
    """

    def __init__(self, vocab_size: int, hidden_size: int, padding_idx: int | None = None) -> None:
        super().__init__(vocab_size, hidden_size)
        self.padding_idx = padding_idx

    def forward(self, token_N: Tensor, batch: SequenceBatch) -> Tensor:
        """Embeds all tokens of the rows and keeps this rank's: ``[N] -> [T, D]``."""
        size = self._sizes[self.tp.index]
        local_N = token_N - self._first
        padding = None if self.padding_idx is None else self.padding_idx - self._first
        padding = padding if padding is not None and 0 <= padding < size else None
        weight_vD = local(self.weight)
        if self.tp.size == 1:
            return F.embedding(local_N, weight_vD, padding)
        absent_N = (local_N < 0) | (local_N >= size)
        if size == 0:
            x_ND = weight_vD.sum() + weight_vD.new_zeros((token_N.shape[0], weight_vD.shape[1]))
        else:
            x_ND = F.embedding(local_N.masked_fill(absent_N, 0), weight_vD, padding).masked_fill(
                absent_N.unsqueeze(-1), 0
            )
        return batch.reduce_scatter(x_ND)


class VocabularyHead(_VocabularyParallel):
    """Output projection with a weight ``[V, D]``, and its cross-entropy.

    Args:
        vocab_size: Number of tokens in the vocabulary, V.
        hidden_size: Size of hidden states, D.
        tied: Embedding whose weight is also the head's; the head then has no parameter of its own.
    """

    def __init__(self, vocab_size: int, hidden_size: int, tied: VocabularyEmbedding | None = None) -> None:
        super().__init__(vocab_size, hidden_size)
        if tied is not None:
            self.register_parameter("weight", None)
        # In a tuple, so that torch does not register the embedding a second time.
        self._tied = (tied,)

    def plans(self, fold: Fold) -> dict[str, ParameterPlan]:
        """Cuts rows of the vocabulary; empty if the weight is the embedding's."""
        return super().plans(fold) if self._tied[0] is None else {}

    def _local_weight(self) -> Tensor:
        return local(self.weight if self._tied[0] is None else self._tied[0].weight)

    def logits(self, x_ND: Tensor) -> Tensor:
        """Returns logits over the whole vocabulary, ``[N, D] -> [N, V]``, on every tp rank; all must then compute the same."""
        local_Nv = F.linear(x_ND, self._local_weight())
        if self.tp.size == 1:
            return local_Nv
        most = max(self._sizes)
        padded_vN = F.pad(local_Nv, [0, most - local_Nv.shape[1]]).t().contiguous()
        parts = comm.gather_identical(padded_vN, self.tp).split(most)
        return torch.cat([part[:size] for part, size in zip(parts, self._sizes, strict=True)]).t()

    def cross_entropy(self, x_ND: Tensor, label_N: Tensor, weight_N: Tensor) -> Tensor:
        """Computes the weighted sum of negative log-likelihoods; the value is equal on every tp rank.

        Args:
            x_ND: Hidden states of the tokens that have a label.
            label_N: Labels of these tokens, each within the vocabulary.
            weight_N: Weight of each token's loss, in at least float32.

        Returns:
            A scalar in the dtype of ``weight_N``. Gradients are computed together with the value, chunk by chunk, so
            the logits are computed once and only ``C x v`` of them exist at a time.
        """
        rows = chunk_rows(self.vocab_size, self.tp.size, x_ND.device.type)
        # Read here, because inside an autograd function gradients are always off.
        wanted = torch.is_grad_enabled()
        return _CrossEntropy.apply(x_ND, self._local_weight(), label_N, weight_N, self._first, self.tp, rows, wanted)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_vD: Tensor,
        label_N: Tensor,
        scale_N: Tensor,
        first: int,
        tp: Axis,
        rows: int,
        wanted: bool,
    ) -> Tensor:
        """Computes the weighted sum of the losses, and the gradients if any is wanted, chunk by chunk."""
        want_x, want_weight = (wanted and needed for needed in ctx.needs_input_grad[:2])
        grad_x = torch.empty_like(x_ND) if want_x else None
        # Written by the first chunk, if there is one.
        make = torch.empty_like if x_ND.shape[0] else torch.zeros_like
        grad_weight = make(weight_vD, dtype=wide(weight_vD.dtype)) if want_weight else None
        total = scale_N.new_zeros(())
        buffer_Cv = x_ND.new_empty(min(rows, x_ND.shape[0]), weight_vD.shape[0])
        for start in range(0, x_ND.shape[0], rows):
            part = slice(start, start + rows)
            x_CD, scale_C = x_ND[part], scale_N[part]
            logits_Cv = torch.mm(x_CD, weight_vD.t(), out=buffer_Cv[: x_CD.shape[0]])
            loss_C, make_slope = _loss_and_slope(logits_Cv, label_N[part] - first, scale_C, tp)
            total += (loss_C * scale_C).sum()
            if not (want_x or want_weight):
                continue
            slope_Cv = make_slope().to(x_ND.dtype)
            if grad_x is not None:
                torch.mm(slope_Cv, weight_vD, out=grad_x[part])
            if grad_weight is not None:
                _add_product(grad_weight, slope_Cv.t(), x_CD, first=start == 0)
        ctx.save_for_backward(grad_x, None if grad_weight is None else grad_weight.to(weight_vD.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Scales the gradients that forward has computed."""
        grad_x, grad_weight = (None if g is None else g * grads[0].to(g.dtype) for g in ctx.saved_tensors)
        return grad_x, grad_weight, None, None, None, None, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """Computes ``total = a @ b`` for the first product, otherwise ``total += a @ b``; in the dtype of ``total``."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=0 if first else 1)
    elif total.is_cuda and total.dtype == torch.float32:  # cuBLAS multiplies in 16 bits and adds in 32
        if first:
            torch.mm(a, b, out_dtype=torch.float32, out=total)
        elif _adds_in_float32(total.device):
            torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
        else:
            total += torch.mm(a, b, out_dtype=torch.float32)
    elif first:
        total.copy_(a @ b)
    else:
        total += a @ b


@cache
def _adds_in_float32(device: torch.device) -> bool:
    """Whether ``addmm`` can add a 16-bit product to a float32 tensor; older PyTorch requires one dtype for all three."""
    total, factor = (torch.zeros(16, 16, dtype=dtype, device=device) for dtype in (torch.float32, torch.bfloat16))
    try:
        torch.addmm(total, factor, factor, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return True


def _loss_and_slope(
    logits_Cv: Tensor, target_C: Tensor, scale_C: Tensor, tp: Axis
) -> tuple[Tensor, Callable[[], Tensor]]:
    """Returns each row's loss over the whole vocabulary, and a function that overwrites the logits by their gradient.

    The gradient is that of ``scale * loss``. Each rank contributes (maximum, sum of exponentials, target's logit),
    exchanged in one all-gather.
    """
    mine_3C, kept_Cv = row_statistics(logits_Cv, target_C, scale_C.dtype)
    top_GC, sum_GC, picked_GC = comm.all_gather_raw(mine_3C, tp).view(tp.size, 3, -1).unbind(1)
    most_C = top_GC.amax(0)
    log_sum_C = ((top_GC - most_C).exp() * sum_GC).sum(0).log() + most_C
    return log_sum_C - picked_GC.sum(0), partial(softmax_slope, kept_Cv, target_C, mine_3C[0], log_sum_C, scale_C)

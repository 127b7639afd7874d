# SPDX-License-Identifier: Apache-2.0
"""Distillation: a model learns the distributions of a teacher whose K largest log-probabilities of each position were stored.

The tokens that were not stored count as one: the loss is the Kullback-Leibler divergence of teacher and student over K + 1
outcomes, which is never above that over all tokens, and equal to it for K + 1 = V.

Legend: B rows, S positions, V vocabulary, K stored tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_moefold.errors import InputError
from lightning_moefold.models.batch import IGNORED


def top_log_probabilities(logits_BSV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """What is stored of a teacher: the largest log-probabilities of each position, and their tokens.

    Args:
        logits_BSV: Of the teacher.
        count: K.

    Returns:
        ``[B, S, K]`` float32, and ``[B, S, K]`` int32.

    Raises:
        InputError: If there are not more tokens than K.
    """
    if not 0 < count < logits_BSV.shape[-1]:
        raise InputError(
            f"of {logits_BSV.shape[-1]} tokens from 1 to {logits_BSV.shape[-1] - 1} can be stored, not {count}."
        )
    top = torch.log_softmax(logits_BSV.float(), -1).topk(count)
    return top.values, top.indices.int()


def distillation_loss(weight: float = 1.0, temperature: float = 1.0) -> Callable[..., tuple[Tensor, Tensor]]:
    """A ``loss_fn`` for :meth:`.MoECausalLM.forward`, with ``teacher_logprobs`` and ``teacher_ids`` ``[B, S, K]`` as its extras.

    ::

        output = model(**batch, loss_fn=distillation_loss(0.5), teacher_logprobs=..., teacher_ids=...)

    A position counts if it predicts a label that is not -100 and not of another document.

    Args:
        weight: Of the divergence; the rest is that of the cross-entropy with the labels.
        temperature: By which the log-probabilities of both are divided before they are normalised again; the divergence is
            multiplied by its square, so that gradients keep their size.

    Raises:
        InputError: For values that cannot be; by the ``loss_fn``, for a teacher with another vocabulary or another number of rows.
    """
    if not 0 <= weight <= 1:
        raise InputError(f"weight={weight} must be from 0 to 1.")
    if not temperature > 0:
        raise InputError(f"temperature={temperature} must be greater than 0.")

    def loss_fn(
        logits_BSV: Tensor, labels_BS: Tensor, teacher_logprobs: Tensor, teacher_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the sum of the losses of all positions that count, and how many they are."""
        _check(logits_BSV, teacher_logprobs, teacher_ids)
        mask_BS = labels_BS[:, 1:] != IGNORED
        chosen_NV = logits_BSV[:, :-1][mask_BS]
        wide_NV = chosen_NV.to(torch.promote_types(chosen_NV.dtype, torch.float32))
        student_NV = torch.log_softmax(wide_NV, -1)
        loss = torch.nn.functional.nll_loss(student_NV, labels_BS[:, 1:][mask_BS], reduction="sum") * (1 - weight)
        if weight:
            ids_NK = teacher_ids[:, :-1][mask_BS].long()
            teacher_NK = teacher_logprobs[:, :-1][mask_BS].to(wide_NV.dtype)
            loss = loss + weight * temperature**2 * _divergence(student_NV, teacher_NK, ids_NK, temperature).sum()
        return loss, mask_BS.sum()

    return loss_fn


def _check(logits_BSV: Tensor, teacher_BSK: Tensor, ids_BSK: Tensor) -> None:
    if teacher_BSK.shape != ids_BSK.shape or teacher_BSK.shape[:2] != logits_BSV.shape[:2]:
        raise InputError(
            f"the teacher's log-probabilities {list(teacher_BSK.shape)} and tokens {list(ids_BSK.shape)} must have the rows and "
            f"positions of the batch, {list(logits_BSV.shape[:2])}."
        )
    largest, size = int(ids_BSK.max()), logits_BSV.shape[-1]
    if largest >= size:
        raise InputError(
            f"the teacher's token {largest} is none of the model's {size}; distil from a teacher with the same vocabulary."
        )


def _divergence(student_NV: Tensor, teacher_NK: Tensor, ids_NK: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence over the stored tokens and the rest of the vocabulary together, ``[N]``."""
    student_NK = student_NV.gather(1, ids_NK)
    teacher_NJ = torch.cat([teacher_NK, _rest(teacher_NK)], 1) / temperature
    student_NJ = torch.cat([student_NK, _rest(student_NK)], 1) / temperature
    teacher_NJ, student_NJ = torch.log_softmax(teacher_NJ, 1), torch.log_softmax(student_NJ, 1)
    return (teacher_NJ.exp() * (teacher_NJ - student_NJ)).sum(1)


def _rest(logprobs_NK: Tensor) -> Tensor:
    """The log-probability of all other tokens together, ``[N, 1]``."""
    tiny = torch.finfo(logprobs_NK.dtype).tiny
    rest_N1 = -torch.expm1(logprobs_NK.logsumexp(1, keepdim=True).clamp(max=0))
    return rest_N1.clamp(min=tiny).log()

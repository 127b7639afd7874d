# SPDX-License-Identifier: Apache-2.0
"""Reads attention masks, and finds which labels are predicted.

Legend: B rows, S positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_moefold.errors import InputError
from lightning_moefold.models.config import MoEConfig
from lightning_moefold.modules.attention.blockwise import sees_nothing

IGNORED = -100


def read_mask(attention_mask: Tensor | None, document_ids: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Splits an attention mask into padding and documents.

    A mask with values above 1 numbers the documents of a row: 1, 1, 1, 2, 2, 0.

    Args:
        attention_mask: ``[B, S]`` integers or bool, 0 for padding.
        document_ids: Document of each token as passed by the caller, ``[B, S]``, or None.

    Returns:
        A mask that is False for padding, ``[B, S]`` bool, or None if there is no padding; and the ids of documents, or
        None.

    Raises:
        ValueError: If a number is negative, or both the mask and ``document_ids`` number documents.
    """
    if attention_mask is None:
        return None, document_ids
    if attention_mask.dtype == torch.bool:
        return None if bool(attention_mask.all()) else attention_mask, document_ids
    low, high = torch.stack(attention_mask.long().aminmax()).tolist()
    if low < 0:
        raise InputError(
            f"attention_mask holds {low}; give 1 for tokens (or the number of each token's document) and 0 for padding."
        )
    real_BS = attention_mask != 0
    if high > 1:
        if document_ids is not None:
            raise InputError(
                f"attention_mask numbers documents (up to {high}) beside document_ids; give a mask of 0 and 1, or no ids."
            )
        document_ids = _with_padding(attention_mask.long(), real_BS)
    return None if low > 0 else real_BS, document_ids


def _with_padding(number_BS: Tensor, real_BS: Tensor) -> Tensor:
    """Assigns padding to the document before it, or at the beginning of a row to the one after it.

    So a row with only 0 and 1 means the same whether or not other rows hold more documents.
    """
    place_S = torch.arange(number_BS.shape[1], device=number_BS.device)
    first_B1 = real_BS.long().argmax(1, keepdim=True)
    last_BS = torch.where(real_BS, place_S, 0).cummax(1).values
    return number_BS.gather(1, torch.maximum(last_BS, first_B1))


def shift(x_BS: Tensor, last: float) -> Tensor:
    """Shifts by one: position t gets the value of position t + 1, and the last one gets ``last``."""
    return torch.cat([x_BS[:, 1:], torch.full_like(x_BS[:, :1], last)], dim=1)


def shortest_window(config: MoEConfig) -> int | None:
    """Returns the shortest attention window of any layer, in keys including the query's own; None if no layer has one."""
    return min((window for window in config.sliding_windows if window is not None), default=None)


def find_targets(
    labels: Tensor, attention_mask: Tensor | None, document_ids: Tensor | None, window: int | None
) -> Tensor:
    """Returns the label that each position predicts, ``[B, S]`` int64; :data:`IGNORED` if none.

    These are the labels that ``transformers`` uses, shifted by one, except two kinds. A label across the border of two
    documents is ignored. So is a label that would be predicted by padding without a token before it, such as the first
    label after padding on the left: the output of such a position depends on the attention kernel.

    Args:
        labels: Labels at the positions of the tokens, ``[B, S]``.
        attention_mask: The mask passed to the model, or the mask returned by :func:`read_mask`.
        document_ids: The document ids passed to the model, or returned by :func:`read_mask`.
        window: Result of :func:`shortest_window`.

    Raises:
        ValueError: If the mask is wrong; see :func:`read_mask`.
    """
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        attention_mask, document_ids = read_mask(attention_mask, document_ids)
    real_BS, target_BS = attention_mask, shift(labels.long(), IGNORED)
    if document_ids is not None:
        target_BS = target_BS.masked_fill(shift(document_ids, -1) != document_ids, IGNORED)
    if real_BS is not None:
        target_BS = target_BS.masked_fill(sees_nothing(real_BS, document_ids, window), IGNORED)
    return target_BS

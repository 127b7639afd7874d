# SPDX-License-Identifier: Apache-2.0
"""What an attention mask says, and which labels have a prediction.

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
    """Padding and documents.

    A mask of more values than 0 and 1 numbers the documents of a row: 1, 1, 1, 2, 2, 0.

    Args:
        attention_mask: ``[B, S]`` integers or bool, 0 for padding.
        document_ids: ``[B, S]``, as the caller gave them.

    Returns:
        False for padding, ``[B, S]`` bool, or None where there is none; and the ids of documents, or None.

    Raises:
        ValueError: For a negative number, or documents that are numbered twice.
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
    """Padding counted to the document before it, or after it at the beginning of a row.

    So a row with the numbers 0 and 1 means the same among rows with more documents as it does alone.
    """
    place_S = torch.arange(number_BS.shape[1], device=number_BS.device)
    first_B1 = real_BS.long().argmax(1, keepdim=True)
    last_BS = torch.where(real_BS, place_S, 0).cummax(1).values
    return number_BS.gather(1, torch.maximum(last_BS, first_B1))


def shift(x_BS: Tensor, last: float) -> Tensor:
    """Position t takes the value of position t + 1."""
    return torch.cat([x_BS[:, 1:], torch.full_like(x_BS[:, :1], last)], dim=1)


def shortest_window(config: MoEConfig) -> int | None:
    """The fewest keys that a query sees in any layer, itself included; None where it sees all before it."""
    return min((window for window in config.sliding_windows if window is not None), default=None)


def find_targets(
    labels: Tensor, attention_mask: Tensor | None, document_ids: Tensor | None, window: int | None
) -> Tensor:
    """The label that each position predicts, ``[B, S]`` int64; :data:`IGNORED` where it predicts none.

    Those are the labels of ``transformers``, which shifts them by one, without two kinds: a label across the border of
    two documents, and one that padding would predict which has no token before it, such as the label of the first token
    after padding on the left. What such a position computes is up to the attention kernel.

    Args:
        labels: ``[B, S]``, at the positions of the tokens.
        attention_mask: As the model is given it, or as :func:`read_mask` returns it.
        document_ids: Likewise.
        window: See :func:`shortest_window`.

    Raises:
        ValueError: See :func:`read_mask`.
    """
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        attention_mask, document_ids = read_mask(attention_mask, document_ids)
    real_BS, target_BS = attention_mask, shift(labels.long(), IGNORED)
    if document_ids is not None:
        target_BS = target_BS.masked_fill(shift(document_ids, -1) != document_ids, IGNORED)
    if real_BS is not None:
        target_BS = target_BS.masked_fill(sees_nothing(real_BS, document_ids, window), IGNORED)
    return target_BS

# SPDX-License-Identifier: Apache-2.0
"""The loss of a whole data set, and of each of its documents, exactly: every label token weighs the same.

The mean of batch losses, which Lightning would log, is another number as soon as batches have unequal numbers of
labels. Here each rank adds up its own share and one sum over the data ranks completes it.

Legend: B rows, S positions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from lightning_moefold.checkpoint import stores
from lightning_moefold.models.masks import IGNORED, find_targets


def target_mask(batch: Mapping[str, Tensor], window: int | None = None) -> Tensor:
    """Which positions are labels that the model counts: ``[B, S - 1]`` bool, of positions 1 to S - 1.

    Args:
        batch: As the model is given it.
        window: The model's shortest sliding window, if it has any.
    """
    target_BS = find_targets(batch["labels"], batch.get("attention_mask"), batch.get("document_ids"), window)
    return target_BS[:, :-1] != IGNORED


class MeanLoss:
    """Mean of losses that are means over the label tokens of all ranks, as ``MoECausalLM.lm_loss`` is."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # of loss times weight, and of weights

    def add(self, loss: Tensor, batch: Mapping[str, Tensor], window: int | None = None) -> None:
        """Adds a batch.

        Args:
            loss: Of the batch of all ranks.
            batch: Of this rank; its labels, or ``loss_weights``, weigh the loss.
            window: See :func:`target_mask`.
        """
        mask = target_mask(batch, window).double()
        if (weights := batch.get("loss_weights")) is not None:
            mask = mask * weights[:, 1:]
        weight = mask.sum()
        sums = torch.stack([loss.detach().double() * weight, weight])
        self._sums = sums if self._sums is None else self._sums + sums

    def compute(self, strategy: Strategy) -> Tensor:
        """The mean over everything added on all ranks; begins anew. Collective."""
        assert self._sums is not None
        total, weight = strategy.reduce(self._sums, reduce_op="sum").unbind()
        self._sums = None
        return total / weight


class DocumentLosses:
    """Losses of the label tokens of each document."""

    def __init__(self) -> None:
        self._sums = torch.zeros(0, 2, dtype=torch.float64)  # loss and tokens of each document

    def add(self, logits_BSV: Tensor, batch: Mapping[str, Tensor], window: int | None = None) -> None:
        """Adds a batch, whose ``source_ids`` ``[B, S]`` say which document each token is of."""
        mask_BS = target_mask(batch, window)
        owner_N = batch["source_ids"][:, 1:][mask_BS].cpu()
        loss_N = torch.cat(  # row by row, as logits in float32 may be large
            [
                F.cross_entropy(logits_SV[:-1][mask_S].float(), label_S[1:][mask_S], reduction="none").cpu()
                for logits_SV, label_S, mask_S in zip(logits_BSV, batch["labels"], mask_BS, strict=True)
            ]
        )
        self._grow(int(owner_N.max()) + 1 if len(owner_N) else 0)
        self._sums.index_add_(0, owner_N, torch.stack([loss_N.double(), torch.ones_like(loss_N).double()], 1))

    def _grow(self, count: int) -> None:
        if count > len(self._sums):
            self._sums = torch.cat([self._sums, self._sums.new_zeros(count - len(self._sums), 2)])

    def compute(self, strategy: Strategy) -> Tensor:
        """Loss and tokens of each document over all ranks, ``[documents, 2]``; begins anew. Collective."""
        count = strategy.reduce(torch.tensor(len(self._sums), device=strategy.root_device), reduce_op="max")
        self._grow(int(count))
        sums, self._sums = self._sums, self._sums[:0].clone()
        return strategy.reduce(sums.to(strategy.root_device), reduce_op="sum").cpu()


def write_document_losses(path: Path | str, sums: Tensor, name_of: Callable[[int], str] | None) -> int:
    """Writes one line of JSON for each document that has label tokens; returns how many.

    Args:
        path: The file, here or in a store.
        sums: Loss and tokens of each document.
        name_of: Function that returns where a document was found.
    """
    lines = []
    for number, (loss, tokens) in enumerate(sums.tolist()):
        if tokens:
            mean = torch.tensor(loss / tokens, dtype=torch.float64)
            line: dict[str, object] = {"document": number} | ({"source": name_of(number)} if name_of else {})
            line |= {"tokens": int(tokens), "loss": mean.item(), "perplexity": mean.exp().item()}
            lines.append(json.dumps(line) + "\n")
    stores.write(path, "".join(lines).encode())
    return len(lines)

# SPDX-License-Identifier: Apache-2.0
"""Random token batches, different on every data rank, and functions that join them for one process.

Shapes: R rows, L positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_moefold.errors import InputError

IGNORE = -100
"""Label of a position without a target."""

Batch: TypeAlias = Mapping[str, Tensor]
"""Tensors ``[R, L]``: ``input_ids``, ``labels``, optional ``attention_mask``, ``position_ids``, ``document_ids``,
``loss_weights``."""

GlobalBatch: TypeAlias = Batch | Sequence[Batch]
"""One batch of all data ranks: either joined in rank order, or one batch per rank."""

Padding = Literal["none", "right", "left"]
Ignore = Literal["none", "uneven", "one_rank_empty", "all"]


def make_batches(
    num: int,
    data_ranks: int,
    rows: int,
    length: int,
    vocab: int,
    *,
    seed: int = 0,
    padding: Padding = "none",
    ignore: Ignore = "none",
) -> list[list[dict[str, Tensor]]]:
    """Draws random batches.

    Args:
        num: Number of batches.
        data_ranks: Number of data ranks.
        rows: Rows R of each rank.
        length: Positions L of each row, at least 2.
        vocab: Tokens are in ``[0, vocab)``.
        seed: Seed of the data.
        padding: Side on which rows are padded. Each row keeps a random length of at least L / 2, and at least one row
            of each rank is not padded. Padding has token 0 and label -100. With padding on the left, the first token's
            label is -100 too: after the shift, padding without a token before it would predict it, and the output of
            such a position depends on the attention kernel.
        ignore: Labels to replace by -100. ``"uneven"``: rank r keeps about one label in ``1 + 3 r``, but at least one.
            ``"one_rank_empty"``: all labels of one rank, a different rank in each batch. ``"all"``: all labels.

    Returns:
        ``batches[step][data_rank]``: ``input_ids`` and ``labels`` (int64 ``[R, L]``), and with padding
        ``attention_mask`` (int64 ``[R, L]``, 1 for tokens).

    Raises:
        ValueError: If ``padding`` or ``ignore`` is unknown, or the length is below 2.
    """
    if padding not in ("none", "right", "left") or ignore not in ("none", "uneven", "one_rank_empty", "all"):
        raise InputError(f"unknown padding={padding!r} or ignore={ignore!r}")
    if length < 2:
        raise InputError(f"length={length} leaves no position with a target: it must be at least 2")
    batches = []
    for step in range(num):
        ranks = []
        for rank in range(data_ranks):
            generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * 10_007 + rank)
            batch = _draw(rows, length, vocab, padding, generator)
            empty = ignore == "all" or (ignore == "one_rank_empty" and rank == step % data_ranks)
            if empty:
                batch["labels"].fill_(IGNORE)
            elif ignore == "uneven":
                _thin_out(batch["labels"], 1 / (1 + 3 * rank), generator)
            ranks.append(batch)
        batches.append(ranks)
    return batches


def _draw(rows: int, length: int, vocab: int, padding: Padding, generator: torch.Generator) -> dict[str, Tensor]:
    """Draws one rank's batch with all labels."""
    input_ids = torch.randint(vocab, (rows, length), generator=generator)
    if padding == "none":
        return {"input_ids": input_ids, "labels": input_ids.clone()}
    lengths = torch.randint(max(2, length // 2), length + 1, (rows, 1), generator=generator)
    lengths[int(torch.randint(rows, (), generator=generator))] = length
    mask = torch.arange(length) < lengths
    if padding == "left":
        mask = mask.flip(1)
    labels = input_ids.masked_fill(~mask, IGNORE)
    if padding == "left":
        labels.scatter_(1, length - lengths, IGNORE)
    return {"input_ids": input_ids.masked_fill(~mask, 0), "labels": labels, "attention_mask": mask.long()}


def _thin_out(labels: Tensor, keep: float, generator: torch.Generator) -> None:
    """Drops labels in place, but never the last one that is a target (the first position of a row never is)."""
    targets = (labels[:, 1:] != IGNORE).nonzero()
    row, position = targets[int(torch.randint(len(targets), (), generator=generator))].tolist()
    kept = labels[row, position + 1].clone()
    labels.masked_fill_(torch.rand(labels.shape, generator=generator) >= keep, IGNORE)
    labels[row, position + 1] = kept


def join_rows(batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Concatenates the rows of several batches.

    Args:
        batches: Batches with the same keys and the same length L.

    Returns:
        One batch ``[sum of R, L]``.

    Raises:
        ValueError: If keys or lengths differ.
    """
    keys = list(batches[0])
    if any(set(batch) != set(keys) for batch in batches):
        raise InputError(f"the data ranks' batches have different keys: {[sorted(batch) for batch in batches]}")
    lengths = {tensor.shape[1] for batch in batches for tensor in batch.values()}
    if len(lengths) != 1:
        raise InputError(f"the data ranks' rows have different lengths {sorted(lengths)}")
    return {key: torch.cat([batch[key] for batch in batches]) for key in keys}


def micro_batches(batch: GlobalBatch, num_microbatches: int) -> list[dict[str, Tensor]]:
    """Forms micro-batch j as the union over data ranks of every rank's j-th ``tensor_split`` block of rows.

    Args:
        batch: One batch of all data ranks; one batch per rank if there is more than one micro-batch.
        num_microbatches: Number M of micro-batches.

    Returns:
        M batches, which together hold every row once, without those in which no token counts (a short batch may have
        such).

    Raises:
        ValueError: If the data ranks' rows cannot be separated.
    """
    ranks = [batch] if isinstance(batch, Mapping) else list(batch)
    if num_microbatches == 1:
        return [join_rows(ranks)]
    if isinstance(batch, Mapping):
        raise InputError(f"num_microbatches={num_microbatches} needs one batch per data rank, not their union")
    blocks = [{key: tensor.tensor_split(num_microbatches) for key, tensor in rank.items()} for rank in ranks]
    joined = [
        join_rows([{key: split[j] for key, split in block.items()} for block in blocks])
        for j in range(num_microbatches)
    ]
    return [part for part in joined if bool(part.get("attention_mask", torch.ones_like(part["input_ids"])).any())]


def unpack_documents(batch: Batch) -> dict[str, Tensor]:
    """Gives each document of packed rows a row of its own: attention, positions and labels end at its borders.

    Args:
        batch: A batch with ``document_ids`` ``[R, L]``: neighbours with equal ids form a document. Positions that
            ``attention_mask`` excludes belong to none.

    Returns:
        A batch without ``document_ids``, one row per document, padded on the right, with ``attention_mask``.
    """
    ids = batch["document_ids"]
    real = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(ids, dtype=torch.bool)
    documents = []  # (row, positions)
    for row in range(ids.shape[0]):
        positions = real[row].nonzero().flatten()
        borders = (ids[row, positions].diff() != 0).nonzero().flatten() + 1
        documents += [(row, block) for block in positions.tensor_split(borders.tolist()) if len(block)]
    length = max(len(block) for _, block in documents)
    mask = torch.zeros(len(documents), length, dtype=torch.int64)
    for index, (_, block) in enumerate(documents):
        mask[index, : len(block)] = 1
    result = {"attention_mask": mask}
    for key in batch.keys() - {"document_ids", "attention_mask"}:
        rows = batch[key].new_full((len(documents), length), IGNORE if key == "labels" else 0)
        for index, (row, block) in enumerate(documents):
            rows[index, : len(block)] = batch[key][row, block]
        result[key] = rows
    return result

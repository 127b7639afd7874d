# SPDX-License-Identifier: Apache-2.0
"""Runs a single block in a custom network: tokens are whole outside of it and spread over tp inside.

Outside, every tensor parallel rank computes the same on all tokens, so the gradient that leaves the block must be whole
on each of them. Inside, the block works as in a language model.

Legend: N tokens of this data rank, T tokens of this tp rank, D hidden size.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from lightning_moefold.modules.base import ParallelRoot
from lightning_moefold.modules.sequence import SequenceBatch


def run_standalone(block: ParallelRoot, hidden: Tensor, batch: SequenceBatch | None = None) -> Tensor:
    """Runs ``block.forward(tokens, batch)`` on tensors of a custom network.

    Args:
        block: The block, parallelised or not.
        hidden: Input ``[..., D]``, the same on every tp rank.
        batch: Description of the rows, if rows and positions matter. By default the tokens are one row, or this cp
            rank's part of rows.

    Returns:
        A tensor of the shape and dtype of ``hidden``.
    """
    x_ND = hidden.reshape(-1, hidden.shape[-1])
    cut = block.rows
    if batch is None:
        tokens = x_ND.shape[0]
        batch = (
            SequenceBatch(1, tokens, tp=block.tp)
            if cut is None
            else SequenceBatch(tokens // cut.length, cut.layout.length, tp=block.tp, cp=cut.layout.cp)
        )
    if block.mesh is not None:
        batch.row_numbers = range(block.mesh.place["dp"], block.fold.dp * batch.rows, block.fold.dp)
    if batch.padding or (cut is not None and cut.is_padded):
        real_N = torch.ones(batch.tokens, dtype=torch.bool, device=hidden.device)
        if cut is not None:
            real_N = cut.real_N(batch.rows, hidden.device)
        batch.routed_T = batch.counted_T = batch.shard(real_N, value=False)
        batch.num_routed = int(batch.routed_T.sum())
    dtype = block.compute_dtype
    # FSDP2 casts the weights; autocast, which covers the custom network, would cast them again.
    with nullcontext() if dtype is None else torch.autocast(hidden.device.type, enabled=False):
        y_ND = batch.leave(block.forward(batch.enter(x_ND.to(dtype or x_ND.dtype)), batch))
    # A copy if FSDP2 wraps the block: changing a view in place (``y = block(x); y += x``) would remove FSDP2's hook.
    return y_ND.view_as(hidden).to(hidden.dtype, copy=block.settings is not None)

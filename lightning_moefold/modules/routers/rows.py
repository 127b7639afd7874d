# SPDX-License-Identifier: Apache-2.0
"""Gathers whole rows, for routers whose choice for a token depends on the other tokens of its row.

A row may be cut over tp and cp. After a gather over both, in the order of positions, its tokens are the same on each of
these ranks and under every fold. So are all decisions based on them.

Legend: T tokens of this rank, G tokens of the cp x tp group, B rows, S positions, N numbers of each token, E experts, K
experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_moefold import comm
from lightning_moefold.modules.sequence import SequenceBatch


def gather_rows(x_TN: Tensor, batch: SequenceBatch) -> tuple[Tensor, Tensor]:
    """Gathers numbers of all tokens of the rows, bit by bit. Collective over tp and cp, if rows are cut.

    Args:
        x_TN: Floating-point numbers of this rank's tokens.
        batch: Description of the tokens' rows and positions.

    Returns:
        The numbers ``[B, S, N]``, and which of these tokens count, ``[B, S]``; the others are padding and have zeros.
    """
    counted_T = x_TN.new_ones(len(x_TN)) if batch.counted_T is None else batch.counted_T.to(x_TN.dtype)
    packed_TM = torch.cat([x_TN, counted_T.unsqueeze(1)], dim=1)
    packed_GM = comm.all_gather_raw(comm.all_gather_raw(packed_TM, batch.tp), batch.layout.cp)
    cells = batch.rows * batch.layout.length
    # Padding over tp has the place of another token, so all padding goes into an extra cell.
    cell_G = _cells(batch, x_TN.device).masked_fill(packed_GM[:, -1] == 0, cells)
    whole = packed_GM.new_zeros(cells + 1, packed_GM.shape[1]).index_copy_(0, cell_G, packed_GM)[:cells]
    whole_BSM = whole.unflatten(0, (batch.rows, batch.layout.length))
    real_BS = whole_BSM[..., -1] > 0
    return whole_BSM[..., :-1].masked_fill(~real_BS.unsqueeze(-1), 0), real_BS


def own_tokens(x_BSN: Tensor, batch: SequenceBatch) -> Tensor:
    """Takes this rank's tokens from whole rows, ``[B, S, N] -> [T, N]``; values of padding are arbitrary."""
    cell_G = _cells(batch, x_BSN.device)
    cp, tp = batch.layout.cp, batch.tp
    tokens = len(cell_G) // (cp.size * tp.size)
    first = (cp.index * tp.size + tp.index) * tokens
    return x_BSN.flatten(0, 1)[cell_G[first : first + tokens]]


def best_experts(score_TE: Tensor, k: int) -> Tensor:
    """Returns the K experts of highest score, best first, ``[T, K]``; ties by number, which ``topk`` does not guarantee."""
    return score_TE.argsort(dim=-1, descending=True, stable=True)[:, :k]


def _cells(batch: SequenceBatch, device: torch.device) -> Tensor:
    row_G, position_G, _ = batch.places(device)
    return row_G * batch.layout.length + position_G

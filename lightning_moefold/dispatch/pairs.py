# SPDX-License-Identifier: Apache-2.0
"""Pairs of a token and a place (a rank, a node) where some of its experts are: it goes there once.

Legend: T tokens, K experts per token, S places, Q pairs, J places of a token at most.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_moefold.dispatch.permutation import Copies


def places_of(place_TK: Tensor, places: int, kept_TK: Tensor | None) -> tuple[Tensor, Tensor]:
    """Place of each choice, and which tokens go to which place.

    Args:
        place_TK: Where each expert is.
        places: S.
        kept_TK: False for choices that nobody serves, ``[T, K]`` or ``[T, 1]``.

    Returns:
        ``place_TK``, S for what nobody serves, and ``goes_ST`` (bool).
    """
    if kept_TK is not None:
        place_TK = place_TK.masked_fill(~kept_TK, places)
    goes_TS = torch.zeros(place_TK.shape[0], places + 1, dtype=torch.bool, device=place_TK.device)
    return place_TK, goes_TS.scatter_(1, place_TK, True)[:, :places].t().contiguous()


def number_pairs(goes_ST: Tensor, pairs: int, each: int) -> tuple[Copies, Tensor]:
    """Pairs in the order of travel, by place and then by token.

    Args:
        goes_ST: Which token goes where.
        pairs: Q, which the host knows by now.
        each: J.

    Returns:
        The pairs as copies of tokens, and the number of each pair ``[S, T]`` (Q where there is none).
    """
    places, tokens = goes_ST.shape
    device = goes_ST.device
    pair_Q = goes_ST.flatten().logical_not().to(torch.uint8).argsort(stable=True)[:pairs]
    number_ST = torch.full((places * tokens,), pairs, dtype=torch.int64, device=device)
    number_ST[pair_Q] = torch.arange(pairs, device=device)
    number_ST = number_ST.view(places, tokens)
    row_TJ = number_ST.t().sort(dim=1).values[:, :each]
    return Copies(pair_Q % max(1, tokens), row_TJ, complete=pairs == tokens * each), number_ST

# SPDX-License-Identifier: Apache-2.0
"""Pairs of a token and a place (a rank, a node) where some of its experts are: it goes there once.

Legend: see :mod:`.base`; S places, Q pairs, J places of a token at most.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from lightning_moefold.async_comm import wait
from lightning_moefold.balance.copies import CopyPlan
from lightning_moefold.dispatch.base import Choices, Parcel, Return, TokenDispatcher
from lightning_moefold.dispatch.permutation import Copies, unpermute
from lightning_moefold.dispatch.placing import place_choices


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


class PairDispatcher(TokenDispatcher):
    """Sends pairs of a token and a place where some of its experts are; rows for copies of experts travel apart.

    The plans of its parcels hold the pairs as ``copies`` of tokens.
    """

    def dispatch_preprocess(self, x_TD: Tensor, choices: Choices) -> list[Parcel]:
        """See :meth:`.TokenDispatcher.dispatch_preprocess`."""
        if self.config.copies is None:
            return [self.parcel(x_TD, choices, self.local_experts)]
        placed = place_choices(choices, self.config.copies, self)
        plan, borrowed = placed.plan, len(placed.plan.borrowed(self.ep.index))
        parcels = [self.parcel(x_TD, placed.at_home(), self.local_experts, plan)]
        if plan.copies:
            parcels.append(self.parcel(x_TD, placed.copied(), placed.each, plan, borrowed))
        return parcels

    @abstractmethod
    def parcel(
        self, x_TD: Tensor, choices: Choices, local: int, experts: CopyPlan | None = None, borrowed: int | None = None
    ) -> Parcel:
        """Prepares one exchange.

        Args:
            x_TD: Tokens.
            choices: Their experts, ``local`` numbers for each rank.
            local: L of this numbering.
            experts: Which experts have copies.
            borrowed: In the exchange for copies, how many this rank has; the other numbers of its L have no rows.
        """

    def combine_postprocess(self, returns: list[Return], plans: list[Any]) -> Tensor:
        """Sums each token's pairs, ``[T, D]``."""
        backs = zip(returns, plans, strict=True)
        parts = [unpermute(wait((back.y,), back.handle)[0], plan.copies) for back, plan in backs]
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

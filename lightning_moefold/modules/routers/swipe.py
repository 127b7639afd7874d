# SPDX-License-Identifier: Apache-2.0
"""Strict balance: all experts serve equally many tokens (SWIPE of BaGuaLu, PPoPP 2022, and FastMoE).

Legend: T tokens of this rank, B rows, S positions, N = B * S, E experts, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_moefold.dispatch.capacity import comparable, rank_within
from lightning_moefold.modules.routers.options import SwipeOptions
from lightning_moefold.modules.routers.registry import register_router
from lightning_moefold.modules.routers.router import Router
from lightning_moefold.modules.routers.rows import best_experts, gather_rows, own_tokens
from lightning_moefold.modules.sequence import SequenceBatch


@register_router("swipe")
class SwipeRouter(Router):
    """In training, deals the tokens of each row evenly to the experts.

    The K experts of the tokens are found one after the other. Once each token of a row of L tokens (without padding)
    has k experts, no expert has more than ``ceil(k * L / E)`` tokens of the row:

    1. Each token that waits for its k-th expert asks, of the experts that it does not have and that have room, the one
       with the highest score (with bias), ties by number. An expert with more askers than room takes those with the
       highest scores, ties by position. The others ask again, until no token can.
    2. A waiting token that already has all experts with room swaps with another token; such tokens do so in the order
       of positions. Take the first expert with room. Of the tokens that do not have it, the one with the highest score
       for it (the giver) takes it. In exchange, the giver gives up one of its experts to the waiting token: among those
       that the waiting token lacks, the one that the waiting token scores highest. There always is one, because the
       giver has as many experts as the waiting token will have, and the expert with room is not among them.

    When tokens are compared, scores that differ only by rounding count as equal (:func:`~.capacity.comparable`). The
    weights are the router's weights for the experts that a token got. In evaluation all tokens go to their best
    experts. So does padding in training, which takes no room.

    FastMoE balances ranks instead of experts, in the order in which tokens arrive, and moves the excess to the next
    rank with room. Its result depends on the layout, and a token may get the same expert twice.
    """

    Options = SwipeOptions

    def choose(self, score_TE: Tensor, batch: SequenceBatch) -> Tensor:
        """Collective over tp and cp in training; see :meth:`Router.choose`."""
        score_TE = self.preferences(score_TE)
        best_TK = best_experts(score_TE, self.top_k)
        if not self.training or self.top_k == self.num_experts:
            return best_TK
        has_TE = own_tokens(balanced(*gather_rows(score_TE, batch), self.top_k), batch)
        chosen_TK = best_experts(score_TE.masked_fill(~has_TE, float("-inf")), self.top_k)
        return chosen_TK if batch.counted_T is None else torch.where(batch.counted_T.unsqueeze(1), chosen_TK, best_TK)


def balanced(score_BSE: Tensor, real_BS: Tensor, k: int) -> Tensor:
    """Returns which experts each token gets, ``[B, S, E]`` bool: k for each token that counts, none for others.

    The host waits for the device once in each round of asking. There are at most E rounds for each of the k experts.

    Args:
        score_BSE: Finite scores.
        real_BS: Which tokens count.
        k: Number of experts per token, K.
    """
    rows, _, experts = score_BSE.shape
    length_B1 = real_BS.sum(1, keepdim=True)
    has_BSE = torch.zeros_like(score_BSE, dtype=torch.bool)
    for number in range(1, k + 1):
        limit_B1 = (number * length_B1 + experts - 1) // experts
        room_BE = limit_B1 - has_BSE.sum(1)
        waiting_BS = real_BS.clone()
        _ask(score_BSE, has_BSE, room_BE, waiting_BS)
        for row, position in waiting_BS.nonzero().tolist():
            _make_room(score_BSE[row], has_BSE[row], room_BE[row], real_BS[row], position)
    return has_BSE


def _ask(score_BSE: Tensor, has_BSE: Tensor, room_BE: Tensor, waiting_BS: Tensor) -> None:
    """Runs rounds of asking (step 1); changes all arguments except the scores."""
    rows, length, experts = score_BSE.shape
    row_BS = torch.arange(rows, device=score_BSE.device).unsqueeze(1).expand(rows, length)
    position_N = torch.arange(rows * length, device=score_BSE.device)
    for _ in range(experts):  # in each round, a row is done or another of its experts gets full
        open_BSE = ~has_BSE & (room_BE > 0).unsqueeze(1) & waiting_BS.unsqueeze(-1)
        asks_BS = open_BSE.any(-1)
        if not bool(asks_BS.any()):
            return
        expert_BS = score_BSE.masked_fill(~open_BSE, float("-inf")).argmax(-1)
        likes_BS = comparable(score_BSE.gather(-1, expert_BS.unsqueeze(-1)).squeeze(-1))
        key_BS = (row_BS * experts + expert_BS).masked_fill(~asks_BS, rows * experts)
        place_N = rank_within(key_BS.flatten(), likes_BS.flatten(), position_N, rows * experts + 1)
        gets_BS = asks_BS & (place_N.view_as(key_BS) < room_BE.gather(1, expert_BS))
        has_BSE |= torch.zeros_like(has_BSE).scatter_(-1, expert_BS.unsqueeze(-1), gets_BS.unsqueeze(-1))
        room_BE.scatter_add_(1, expert_BS, -gets_BS.long())
        waiting_BS &= ~gets_BS


def _make_room(score_SE: Tensor, has_SE: Tensor, room_E: Tensor, real_S: Tensor, position: int) -> None:
    """Finds an expert for a token that has all experts with room (step 2); changes ``has_SE`` and ``room_E``."""
    free = (room_E > 0).long().argmax()
    giver = comparable(score_SE[:, free]).masked_fill(~real_S | has_SE[:, free], float("-inf")).argmax()
    given_E = has_SE[giver] & ~has_SE[position]
    given = score_SE[position].masked_fill(~given_E, float("-inf")).argmax()
    has_SE[giver, free], has_SE[giver, given], has_SE[position, given] = True, False, True
    room_E[free] -= 1

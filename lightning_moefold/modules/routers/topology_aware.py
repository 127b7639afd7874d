# SPDX-License-Identifier: Apache-2.0
"""A router that limits choices across the slow links between nodes (the topology-aware gate of FasterMoE, PPoPP 2022).

Legend: T tokens of this rank, B rows, S positions, E experts, K experts per token, N nodes, R data ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_moefold.dispatch.capacity import comparable
from lightning_moefold.modules.routers.options import TopologyAwareOptions
from lightning_moefold.modules.routers.registry import register_router
from lightning_moefold.modules.routers.router import Router
from lightning_moefold.modules.routers.rows import best_experts, gather_rows, own_tokens
from lightning_moefold.modules.sequence import SequenceBatch


@register_router("topology_aware")
class TopologyAwareRouter(Router):
    """In training, limits how many of a row's choices are experts on other nodes, and replaces the rest by near experts.

    The numbers of rows and experts determine their nodes:

        node of row i    = floor((i mod R) * N / R)        R data ranks, N nodes
        node of expert e = floor(e * N / E)

    Of the ``K * L`` best choices of a row (L tokens, without padding) at most ``floor(far_fraction * K * L)`` may be
    experts on another node: those with the highest scores (with bias), ties by position, then by rank among the token's
    choices. Scores that differ only by rounding count as equal (:func:`~.capacity.comparable`). Each other far choice
    is replaced by the best expert on the row's node that the token does not have. In evaluation all tokens go to their
    best experts. So does padding in training, which does not use up the limit.

    FasterMoE has K = 2 and limits only the first choice; if the limit is exceeded, all tokens choose again.
    """

    Options = TopologyAwareOptions
    options: TopologyAwareOptions

    def choose(self, score_TE: Tensor, batch: SequenceBatch) -> Tensor:
        """Collective over tp and cp in training; see :meth:`Router.choose`."""
        score_TE = self.preferences(score_TE)
        best_TK = best_experts(score_TE, self.top_k)
        if not self.training:
            return best_TK
        far_TE = self._far(batch, score_TE.device)
        far_TK = far_TE.gather(1, best_TK)
        asking_TK = comparable(score_TE.gather(1, best_TK)).masked_fill(~far_TK, float("-inf"))
        goes_TK = own_tokens(within_budget(*gather_rows(asking_TK, batch), self.options.far_fraction), batch)
        if batch.counted_T is not None:
            goes_TK = goes_TK | ~batch.counted_T.unsqueeze(1)
        open_TE = (~far_TE).scatter(1, best_TK, ~far_TK | goes_TK)
        return best_experts(score_TE.masked_fill(~open_TE, float("-inf")), self.top_k)

    def _far(self, batch: SequenceBatch, device: torch.device) -> Tensor:
        """Returns which experts are on another node than each token, ``[T, E]`` bool."""
        nodes = self.options.nodes
        ranks = self.options.data_ranks or nodes
        row_T, _ = batch.token_places(device)
        node_E = torch.arange(self.num_experts, device=device) // (self.num_experts // nodes)
        return (row_T % ranks * nodes // ranks).unsqueeze(1) != node_E


def within_budget(score_BSK: Tensor, real_BS: Tensor, fraction: float) -> Tensor:
    """Returns which choices may go to other nodes, ``[B, S, K]``: at most ``floor(fraction * K * L)`` in each row.

    Args:
        score_BSK: Scores of the choices, which decide who goes; -inf for choices on the row's own node.
        real_BS: Which tokens count; their number in a row is L.
        fraction: ``far_fraction`` of :class:`~.options.TopologyAwareOptions`.
    """
    _, length, k = score_BSK.shape
    budget_B = (fraction * k * real_BS.sum(1).double()).floor().long()
    score_BC = score_BSK.masked_fill(~real_BS.unsqueeze(-1), float("-inf")).flatten(1)
    order_BC = score_BC.argsort(dim=1, descending=True, stable=True)
    place_BC = torch.empty_like(order_BC).scatter_(
        1, order_BC, torch.arange(length * k, device=order_BC.device).expand_as(order_BC)
    )
    return ((place_BC < budget_B.unsqueeze(1)) & (score_BC > float("-inf"))).view_as(score_BSK)

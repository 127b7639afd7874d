# SPDX-License-Identifier: Apache-2.0
"""Two-level dispatch, for expert parallel groups that span nodes: a token crosses to each node once, and is spread there.

    token_dispatch    all-to-all-v between nodes, to the rank of the same place in each node: pairs (token, node), with the
                      weights and numbers of that node's experts
    dispatch_post..   deduplicated dispatch within the node, of what has arrived
    combine_pre..     its way back, to one row for each pair
    token_combine     all-to-all-v between nodes: pairs

The slow links carry a token once per node in each direction, however many of its experts live there (the idea of the
forwarding in DeepEP and of hierarchical all-to-all in HetuMoE, arXiv 2203.14685). The first level is the one that hides
behind the shared expert. The host waits for the device twice a layer, once for each level's sizes. Rows for copies of experts
(:mod:`.placing`) travel apart, in both steps.

Legend: see :mod:`.base`; N nodes, Q pairs sent, A pairs that arrive.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_moefold import comm
from lightning_moefold.async_comm import Exchange, start, wait
from lightning_moefold.balance.copies import CopyPlan
from lightning_moefold.dispatch.base import Choices, ExpertAxes, ExpertRows, Parcel, Return
from lightning_moefold.dispatch.config import DispatchConfig
from lightning_moefold.dispatch.deduplicated import DeduplicatedDispatcher
from lightning_moefold.dispatch.packing import pack, unpack
from lightning_moefold.dispatch.pairs import PairDispatcher, number_pairs, places_of
from lightning_moefold.dispatch.permutation import Copies, permute


@dataclass
class NodePlan:
    """The exchange between nodes, and later the one within.

    Args:
        copies: Pairs, as copies of this rank's tokens.
        send: Pairs to each node.
        receive: Pairs from each node.
        expert_QK: Experts of the pairs sent, numbered within their node; -1 where a choice is another node's.
        local: Numbers of experts for each rank.
        experts: Which experts have copies, where copies are planned.
        borrowed: In the exchange for copies, how many this rank has.
        within: What goes on in the node; once the pairs are there.
    """

    copies: Copies
    send: list[int]
    receive: list[int]
    expert_QK: Tensor
    local: int
    experts: CopyPlan | None = None
    borrowed: int | None = None
    within: Parcel | None = None


class HierarchicalDispatcher(PairDispatcher):
    """Between nodes, then within; see the module. ``axes.nodes`` and ``axes.within`` must be there."""

    def __init__(self, config: DispatchConfig, num_experts: int, top_k: int, axes: ExpertAxes = ExpertAxes()) -> None:
        super().__init__(config, num_experts, top_k, axes)
        assert axes.nodes is not None
        assert axes.within is not None
        self.nodes = axes.nodes
        inside = replace(config, dispatcher="deduplicated", copies=None)
        self._within = DeduplicatedDispatcher(inside, num_experts // self.nodes.size, top_k, axes.within)

    def parcel(
        self, x_TD: Tensor, choices: Choices, local: int, experts: CopyPlan | None = None, borrowed: int | None = None
    ) -> Parcel:
        """See :meth:`.PairDispatcher.parcel`."""
        nodes, expert_TK = self.nodes.size, choices.expert_TK
        of_node = local * self._within.ep.size
        node_TK, goes_NT = places_of(expert_TK // of_node, nodes, choices.kept_TK)
        sent_N = goes_NT.sum(1)
        received_N = comm.all_gather_raw(sent_N, self.nodes).view(nodes, nodes)[:, self.nodes.index]
        # One of the two places where the host must know sizes.
        sizes = torch.cat([sent_N, received_N]).tolist()
        send, receive = sizes[:nodes], sizes[nodes:]
        copies, _ = number_pairs(goes_NT, sum(send), min(expert_TK.shape[1], nodes))
        token_Q = copies.token_R
        node_Q = torch.arange(nodes, device=token_Q.device).repeat_interleave(sent_N, output_size=sum(send))
        elsewhere_QK = node_TK[token_Q] != node_Q.unsqueeze(1)
        expert_QK = (expert_TK % of_node)[token_Q].masked_fill(elsewhere_QK, -1)
        weight_QK = permute(choices.weight_TK, copies).masked_fill(elsewhere_QK, 0)
        plan = NodePlan(copies, send, receive, expert_QK, local, experts, borrowed)
        return Parcel(permute(x_TD, copies), weight_QK, plan)

    def token_dispatch(self, parcel: Parcel) -> Parcel:
        """Pairs to the nodes of their experts."""
        plan: NodePlan = parcel.plan
        there = Exchange(plan.send, plan.receive)
        packed_QK2 = pack(parcel.weight, plan.expert_QK)
        yields = plan.borrowed is None
        (x_AD, packed_AK2), handle = start((parcel.x, packed_QK2), (there, there), self.nodes, yields=yields)
        return Parcel(x_AD, packed_AK2, plan, handle)

    def dispatch_postprocess(self, parcel: Parcel) -> tuple[Tensor, ExpertRows]:
        """From the rank that received them to the ranks of the node."""
        plan: NodePlan = parcel.plan
        x_AD, packed_AK2 = wait((parcel.x, parcel.weight), parcel.handle)
        weight_AK, expert_AK = unpack(packed_AK2)
        choices = Choices(weight_AK, expert_AK.clamp(min=0), expert_AK >= 0)
        within = self._within.parcel(x_AD, choices, plan.local, plan.experts, plan.borrowed)
        plan.within = self._within.token_dispatch(within)
        return self._within.dispatch_postprocess(plan.within)

    def combine_preprocess(self, y_AD: Tensor, plan: NodePlan) -> Tensor:
        """Sums the parts of each expert over etp."""
        return self._within.combine_preprocess(y_AD, _plan_within(plan))

    def token_combine(self, y_AD: Tensor, plan: NodePlan) -> Return:
        """One row per pair, summed over the node, goes home."""
        inside = _plan_within(plan)
        y_AD = self._within.combine_postprocess([self._within.token_combine(y_AD, inside)], [inside])
        back = Exchange(plan.receive, plan.send)
        (y_QD,), handle = start((y_AD,), (back,), self.nodes, yields=plan.borrowed is None)
        return Return(y_QD, handle)


def _plan_within(plan: NodePlan) -> Any:
    assert plan.within is not None, "combine comes after dispatch"
    return plan.within.plan

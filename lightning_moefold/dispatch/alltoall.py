# SPDX-License-Identifier: Apache-2.0
"""The dropless all-to-all dispatcher: any ep, any etp, any number of tokens per rank, zero included.

Six steps, of which two communicate (the workflow of MoE Parallel Folding, section 3, and of Megatron-Core)::

    dispatch_preprocess    sort rows by expert; exchange counts                 (one small all-gather of integers)
    token_dispatch         all-to-all-v over ep, then all-gather-v over etp     (communicates)
    dispatch_postprocess   rows of each local expert next to each other
        ... experts ...
    combine_preprocess     back to the order of arrival
    token_combine          reduce-scatter-v over etp, then all-to-all-v over ep (communicates)
    combine_postprocess    weighted sum of each token's rows

Every rank issues the same collectives whatever its data. On one rank (ep = etp = 1) there is no communication and no
synchronisation with the host; otherwise the host waits for the counts once per layer.

Legend: T tokens of this rank, K experts per token, R rows sent, A rows that arrive over ep, M rows computed here (after
etp), D hidden size, E experts, L = E / ep local experts, S = ep sources, P = etp peers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_moefold import comm
from lightning_moefold.dispatch.permutation import Permutation, combine, permute, sort_by_expert
from lightning_moefold.mesh import SINGLE, Axis


@dataclass(frozen=True)
class DispatchPlan:
    """What one layer's exchange looks like, known before any token moves.

    Args:
        order: This rank's rows in expert order.
        send: Rows to each ep rank.
        receive: Rows from each ep rank.
        arrived: Rows that each etp peer received over ep.
        expert_order_M: Index that sorts the rows computed here by local expert; None where they already are.
        counts_L: Rows of each local expert, int64, on the device.
    """

    order: Permutation
    send: list[int]
    receive: list[int]
    arrived: list[int]
    expert_order_M: Tensor | None
    counts_L: Tensor


class AllToAllDispatcher:
    """Moves tokens to the ranks of their experts and back.

    Args:
        num_experts: Experts of the layer, E.
        ep: Expert parallel axis.
        etp: Expert tensor parallel axis.
        etp_ep: The joint axis (ep outer, etp inner), for the exchange of counts.
    """

    def __init__(self, num_experts: int, ep: Axis = SINGLE, etp: Axis = SINGLE, etp_ep: Axis = SINGLE) -> None:
        self.num_experts = num_experts
        self.ep, self.etp, self.etp_ep = ep, etp, etp_ep

    def dispatch_preprocess(
        self, x_TD: Tensor, expert_TK: Tensor, routed_T: Tensor | None = None, num_routed: int | None = None
    ) -> tuple[Tensor, DispatchPlan]:
        """Sorts the rows by expert and agrees on who sends how much.

        Args:
            x_TD: Tokens.
            expert_TK: Experts of each token, int64.
            routed_T: False for tokens that are routed nowhere (padding).
            num_routed: How many are routed, where the caller knows.

        Returns:
            The rows ``[R, D]`` and the plan for the steps that follow.
        """
        order = sort_by_expert(expert_TK, self.num_experts, routed_T, num_routed)
        return permute(x_TD, order), self._make_plan(order)

    def _make_plan(self, order: Permutation) -> DispatchPlan:
        if self.etp_ep.size == 1:
            return DispatchPlan(order, [order.rows], [order.rows], [order.rows], None, order.counts_E)
        sources, peers = self.ep.size, self.etp.size
        local = self.num_experts // sources
        counts_SPE = comm.all_gather_raw(order.counts_E, self.etp_ep).view(sources, peers, self.num_experts)
        first = self.ep.index * local
        mine_PSL = counts_SPE[:, :, first : first + local].transpose(0, 1)  # rows for the experts held here
        sent_S = order.counts_E.view(sources, local).sum(1)
        # The one place where the host must know sizes: three short vectors in one transfer.
        sizes = torch.cat([sent_S, mine_PSL[self.etp.index].sum(1), mine_PSL.sum((1, 2))]).tolist()
        send, receive, arrived = sizes[:sources], sizes[sources : 2 * sources], sizes[2 * sources :]
        return DispatchPlan(
            order, send, receive, arrived, self._expert_order(mine_PSL, sum(arrived)), mine_PSL.sum((0, 1)).contiguous()
        )

    @staticmethod
    def _expert_order(mine_PSL: Tensor, rows: int) -> Tensor | None:
        peers, sources, local = mine_PSL.shape
        if local == 1 or peers * sources == 1:
            return None
        expert = torch.arange(local, device=mine_PSL.device).repeat(peers * sources)
        expert_M = expert.repeat_interleave(mine_PSL.reshape(-1), output_size=rows)
        return torch.argsort(expert_M, stable=True)

    def token_dispatch(self, x_RD: Tensor, plan: DispatchPlan) -> Tensor:
        """``[R, D] -> [M, D]``: rows go to the ep rank of their expert, then to all etp ranks that hold a part of it."""
        x_AD = comm.all_to_all(x_RD, plan.send, plan.receive, self.ep)
        return comm.all_gather_uneven(x_AD, plan.arrived, self.etp)

    def dispatch_postprocess(self, x_MD: Tensor, plan: DispatchPlan) -> Tensor:
        """Puts the rows of each local expert next to each other."""
        return x_MD if plan.expert_order_M is None else _Reorder.apply(x_MD, plan.expert_order_M)

    def combine_preprocess(self, y_MD: Tensor, plan: DispatchPlan) -> Tensor:
        """Back to the order in which the rows arrived."""
        return y_MD if plan.expert_order_M is None else _Reorder.apply(y_MD, _inverse(plan.expert_order_M))

    def token_combine(self, y_MD: Tensor, plan: DispatchPlan) -> Tensor:
        """``[M, D] -> [R, D]``: sums the parts of each expert over etp, then sends every row home."""
        y_AD = comm.reduce_scatter_uneven(y_MD, plan.arrived, self.etp)
        return comm.all_to_all(y_AD, plan.receive, plan.send, self.ep)

    def combine_postprocess(self, y_RD: Tensor, weight_TK: Tensor, plan: DispatchPlan) -> Tensor:
        """Weighted sum over each token's experts, ``[R, D] -> [T, D]``; zero for tokens routed nowhere."""
        return combine(y_RD, weight_TK, plan.order)


def _inverse(order_M: Tensor) -> Tensor:
    inverse = torch.empty_like(order_M)
    inverse[order_M] = torch.arange(order_M.shape[0], device=order_M.device)
    return inverse


class _Reorder(torch.autograd.Function):
    """A permutation of rows, whose backward is the inverse permutation (a gather instead of a scatter)."""

    @staticmethod
    def forward(ctx, x_MD: Tensor, order_M: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.order_M = order_M
        return x_MD.index_select(0, order_M)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return grads[0].index_select(0, _inverse(ctx.order_M)), None

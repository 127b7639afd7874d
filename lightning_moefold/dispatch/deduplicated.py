# SPDX-License-Identifier: Apache-2.0
"""Deduplicated dispatch: a token travels once to each rank that holds some of its experts, and comes back once.

With top-8 over 4 ranks an all-to-all sends a token 8 times, this at most 4 times (the idea of DeepEP's dispatch). The
rank sums what its experts make of the token, weights applied, and returns one row.

    token_dispatch    all-to-all-v over ep: pairs (token, rank), and an index and a weight for each row
    dispatch_post..   all-gather-v of both over etp
    combine_pre..     reduce-scatter-v over etp
    token_combine     all-to-all-v over ep: pairs

The host waits for the device once a layer. With copies of experts (:mod:`.placing`) it waits once more for the plan, and once
for the rows of copies, which travel apart.

Legend: see :mod:`.base`; S ep ranks, P etp peers, Q pairs sent, R rows, i.e. choices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_moefold import comm
from lightning_moefold.async_comm import Exchange, start, wait
from lightning_moefold.balance.copies import CopyPlan
from lightning_moefold.dispatch.base import Choices, ExpertRows, Parcel, Return, expert_of_rows
from lightning_moefold.dispatch.packing import pack, unpack
from lightning_moefold.dispatch.pairs import PairDispatcher, number_pairs, places_of
from lightning_moefold.dispatch.permutation import Copies, permute, sort_by_expert, take_distinct


class Sizes(NamedTuple):
    """Items that travel.

    Args:
        send: To each ep rank.
        receive: From each ep rank.
        arrived: To each etp peer, from all ep ranks.
    """

    send: list[int]
    receive: list[int]
    arrived: list[int]


@dataclass(frozen=True)
class PairPlan:
    """What the exchange looks like, known before any token moves.

    Args:
        copies: Pairs, as copies of this rank's tokens.
        index_R: For each row, which of the pairs sent to its rank it reads.
        pairs: Sizes of the exchange of pairs.
        rows: Likewise of what belongs to the rows.
        counts_PSL: Rows for each local expert, from each source of each peer.
        pairs_PS: Pairs from each source of each peer, on the device.
        held: Experts of this exchange on this rank, at most L of its numbering.
        experts: Which experts have copies, where copies are planned.
        optional: Whether this is an exchange for copies, which other passes may not have.
    """

    copies: Copies
    index_R: Tensor
    pairs: Sizes
    rows: Sizes
    counts_PSL: Tensor
    pairs_PS: Tensor
    held: int
    experts: CopyPlan | None = None
    optional: bool = False


class DeduplicatedDispatcher(PairDispatcher):
    """A row for each pair of token and rank; see the module."""

    def parcel(
        self, x_TD: Tensor, choices: Choices, local: int, experts: CopyPlan | None = None, borrowed: int | None = None
    ) -> Parcel:
        """See :meth:`.PairDispatcher.parcel`."""
        expert_TK, kept_TK = choices.expert_TK, choices.kept_TK
        k, sources = expert_TK.shape[1], self.ep.size
        ordered = sort_by_expert(expert_TK, sources * local, kept_TK, choices.served)
        rank_TK, goes_ST = places_of(expert_TK // local, sources, kept_TK)
        pairs_sent, rows_sent, pairs_PS, counts_PSL = self._sizes_of_exchange(ordered.counts_E, goes_ST)
        copies, number_ST = number_pairs(goes_ST, sum(pairs_sent.send), min(k, sources))
        slot_R = ordered.slot_S[: sum(rows_sent.send)]
        rank_R, token_R = rank_TK.reshape(-1)[slot_R], slot_R // k
        sent_S = goes_ST.sum(1)
        index_R = number_ST[rank_R, token_R] - (sent_S.cumsum(0) - sent_S)[rank_R]
        held, optional = (local, False) if borrowed is None else (borrowed, True)
        plan = PairPlan(
            copies, index_R, pairs_sent, rows_sent, counts_PSL, pairs_PS, held=held, experts=experts, optional=optional
        )
        return Parcel(permute(x_TD, copies), take_distinct(choices.weight_TK.reshape(-1), slot_R), plan)

    def _sizes_of_exchange(self, counts_E: Tensor, goes_ST: Tensor) -> tuple[Sizes, Sizes, Tensor, Tensor]:
        sources, peers, local = self.ep.size, self.etp.size, len(counts_E) // self.ep.size
        sent_S = goes_ST.sum(1)
        known = comm.all_gather_raw(torch.cat([counts_E, sent_S]), self.etp_ep)
        counts_SPE, pairs_SPS = known.view(sources, peers, -1).split([len(counts_E), sources], dim=2)
        first = self.ep.index * local
        counts_PSL = counts_SPE[:, :, first : first + local].transpose(0, 1)
        pairs_PS = pairs_SPS[:, :, self.ep.index].t()
        mine = self.etp.index
        parts = [sent_S, pairs_PS[mine], pairs_PS.sum(1)]
        parts += [counts_E.view(sources, local).sum(1), counts_PSL[mine].sum(1), counts_PSL.sum((1, 2))]
        # The one place where the host must know sizes: all of them in one transfer.
        sizes = torch.cat(parts).tolist()
        lists, start = [], 0
        for part in parts:
            lists.append(sizes[start : start + len(part)])
            start += len(part)
        return Sizes(*lists[:3]), Sizes(*lists[3:]), pairs_PS, counts_PSL

    def token_dispatch(self, parcel: Parcel) -> Parcel:
        """Pairs, and what belongs to each row, to the ep ranks."""
        plan: PairPlan = parcel.plan
        routes = Exchange(plan.pairs.send, plan.pairs.receive), Exchange(plan.rows.send, plan.rows.receive)
        travelling = parcel.x, pack(parcel.weight, plan.index_R)
        (x_AD, packed_A2), handle = start(travelling, routes, self.ep, yields=not plan.optional)
        return Parcel(x_AD, packed_A2, plan, handle)

    def dispatch_postprocess(self, parcel: Parcel) -> tuple[Tensor, ExpertRows]:
        """Which pair each row reads, by expert."""
        plan: PairPlan = parcel.plan
        x_AD, packed_A2 = wait((parcel.x, parcel.weight), parcel.handle)
        x_AD = comm.all_gather_uneven(x_AD, plan.pairs.arrived, self.etp)
        weight_A, index_A = unpack(comm.all_gather_uneven(packed_A2, plan.rows.arrived, self.etp))
        rows = sum(plan.rows.arrived)
        blocks_PS = plan.counts_PSL.sum(2).reshape(-1)
        pairs_PS = plan.pairs_PS.reshape(-1)
        start_PS = pairs_PS.cumsum(0) - pairs_PS
        token_A = index_A + start_PS.repeat_interleave(blocks_PS, output_size=rows)
        order_M = expert_of_rows(plan.counts_PSL.reshape(len(blocks_PS), -1), rows).argsort(stable=True)
        weight_M = take_distinct(weight_A, order_M)
        return x_AD, ExpertRows(token_A[order_M], weight_M, plan.counts_PSL.sum((0, 1))[: plan.held], distinct=False)

    def combine_preprocess(self, y_AD: Tensor, plan: PairPlan) -> Tensor:
        """Sums the parts of each expert over etp."""
        return comm.reduce_scatter_uneven(y_AD, plan.pairs.arrived, self.etp)

    def token_combine(self, y_AD: Tensor, plan: PairPlan) -> Return:
        """One row per pair goes home."""
        back = Exchange(plan.pairs.receive, plan.pairs.send)
        (y_QD,), handle = start((y_AD,), (back,), self.ep, yields=not plan.optional)
        return Return(y_QD, handle)

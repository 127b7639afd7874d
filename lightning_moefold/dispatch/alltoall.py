# SPDX-License-Identifier: Apache-2.0
"""All-to-all dispatch: one row for each choice, dropless or with a capacity, in one part or in several.

    token_dispatch    all-to-all-v over ep (rows, and their weights)
    dispatch_post..   all-gather-v over etp
    combine_pre..     reduce-scatter-v over etp
    token_combine     all-to-all-v over ep

With ``chunks`` the local experts of every rank are taken in C groups, and rows are sorted by group before rank: while one
group computes, the next one's tokens arrive and the last one's results leave (FasterMoE's smart schedule, PPoPP'22, with
collectives that are really under way). Experts and sums are the same, in the same order: so are the bits.

With ``pad_to_capacity`` every rank sends every expert the same number of rows, empty ones of weight zero among them:
sizes are known, no counts are exchanged.

With ``copies`` some experts compute on several ranks in this pass (:mod:`..balance.copies`). Their rows on other ranks travel
in a chunk of their own, the last one, so that their weights (:mod:`..modules.experts.copied`) have until then to arrive.

The host waits for the device once a layer (for the sizes of the exchange; with copies, for the counts, from which it plans),
never with padding, and on a single rank only where tokens are dropped.

Legend: see :mod:`.base`; S ep sources, P etp peers, C chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_moefold import comm
from lightning_moefold.async_comm import Exchange, start, wait
from lightning_moefold.balance.copies import CopyPlan
from lightning_moefold.balance.fast import ExpertCopies
from lightning_moefold.dispatch.base import (
    Choices,
    ExpertAxes,
    ExpertRows,
    Parcel,
    Return,
    TokenDispatcher,
    expert_of_rows,
)
from lightning_moefold.dispatch.config import DispatchConfig
from lightning_moefold.dispatch.copied import travel_of
from lightning_moefold.dispatch.host import to_device
from lightning_moefold.dispatch.permutation import (
    Copies,
    SortedChoices,
    permute,
    sort_by_expert,
    take_distinct,
    unpermute,
)
from lightning_moefold.layout import even_split


@dataclass(frozen=True)
class ChunkPlan:
    """What one chunk's exchange looks like, known before any token moves.

    Args:
        copies: Rows of all chunks, as copies of this rank's tokens.
        send: Rows to each ep rank.
        receive: Rows from each ep rank.
        arrived: Rows that each etp peer received over ep.
        counts_PSL: Rows for each expert of the chunk, from each source of each peer.
        counts: Rows of each expert, where the host knows.
        experts: Which experts have copies in this pass; None without.
        optional: Whether this is the chunk of copies, which is there in some passes and not in others.
    """

    copies: Copies
    send: list[int]
    receive: list[int]
    arrived: list[int]
    counts_PSL: Tensor
    counts: list[int] | None = None
    experts: CopyPlan | None = None
    optional: bool = False


class AllToAllDispatcher(TokenDispatcher):
    """A row for each choice; any ep, any etp, any number of tokens per rank, zero included."""

    def __init__(self, config: DispatchConfig, num_experts: int, top_k: int, axes: ExpertAxes = ExpertAxes()) -> None:
        super().__init__(config, num_experts, top_k, axes)
        chunks = min(config.chunks, self.local_experts) if self.ep.size > 1 else 1
        self._sizes = list(even_split(self.local_experts, chunks))

    @property
    def experts_per_chunk(self) -> list[int]:
        """Local experts of each chunk."""
        return self._sizes

    def _places(self, device: torch.device) -> Tensor | None:
        """Place of each expert in the order of travel: by chunk, then rank, then number."""
        if len(self._sizes) == 1:
            return None
        expert_SL = torch.arange(self.num_experts, device=device).view(self.ep.size, self.local_experts)
        order_E = torch.cat([part.flatten() for part in expert_SL.split(self._sizes, dim=1)])
        return order_E.argsort()

    # ---- there -------------------------------------------------------------------------------------------------

    def dispatch_preprocess(self, x_TD: Tensor, choices: Choices) -> list[Parcel]:
        """See :meth:`.TokenDispatcher.dispatch_preprocess`."""
        if self.config.copies is not None and self.ep.size > 1:
            return self._with_copies(x_TD, choices, self.config.copies)
        weight_TK, places_E = choices.weight_TK, self._places(x_TD.device)
        ordered = sort_by_expert(choices.expert_TK, self.num_experts, choices.kept_TK, choices.served, places_E)
        if choices.capacity is not None:
            return self._padded(ordered, x_TD, weight_TK, choices.capacity)
        sizes, counts = self._sizes_of_exchange(ordered)
        plans, copies = self._plans(ordered, sizes, counts, x_TD.shape[0])
        return _parcels(permute(x_TD, copies), weight_TK, ordered.slot_S, plans)

    def _with_copies(self, x_TD: Tensor, choices: Choices, options: ExpertCopies) -> list[Parcel]:
        """A part for each chunk, and one for the copies if any rank has one."""
        ordered = sort_by_expert(choices.expert_TK, self.num_experts, choices.kept_TK, choices.served)
        counts_SE = comm.all_gather_raw(ordered.counts_E, self.etp_ep)
        # The one place where the host must know sizes.
        known_SE = counts_SE.cpu().numpy().reshape(-1, self.num_experts)
        plan = options.plan(known_SE, self.ep.size)
        travel = travel_of(known_SE, plan, self._sizes, self.ep.index, self.etp.index)
        arrays = [travel.shift_B, travel.rows_B, *(part.counts_PSX for part in travel.parts)]
        shift_B, rows_B, *counts = to_device(arrays, x_TD.device)
        if not travel.in_order:
            ordered = _in_travelling_order(ordered, shift_B, rows_B, int(travel.rows_B.sum()))
        copies = Copies.of_choices(ordered, int(travel.rows_B.sum()), x_TD.shape[0])
        plans = []
        for number, (part, counts_PSL) in enumerate(zip(travel.parts, counts, strict=True)):
            sizes, optional = (part.send, part.receive, part.arrived), number == len(self._sizes)
            plans.append(ChunkPlan(copies, *sizes, counts_PSL, part.counts, plan, optional))
        return _parcels(permute(x_TD, copies), choices.weight_TK, ordered.slot_S, plans)

    def _sizes_of_exchange(self, ordered: SortedChoices) -> tuple[list[list[int]], list[Tensor]]:
        """For each chunk, rows to and from each rank and of each peer in one list, and ``counts_PSL``."""
        sources, peers, local = self.ep.size, self.etp.size, self.local_experts
        if self.etp_ep.size == 1:
            rows = int(ordered.counts_E.sum()) if ordered.served is None else ordered.served
            return [[rows, rows, rows]], [ordered.counts_E.view(1, 1, -1)]
        counts_SPE = comm.all_gather_raw(ordered.counts_E, self.etp_ep).view(sources, peers, self.num_experts)
        counts, sizes, start = [], [], 0
        for size in self._sizes:
            block = slice(start, start + sources * size)  # the experts of this chunk on all ranks
            sent_S = ordered.counts_E[block].view(sources, size).sum(1)
            mine_PSL = counts_SPE[:, :, block].unflatten(2, (sources, size))[:, :, self.ep.index].transpose(0, 1)
            counts.append(mine_PSL)
            sizes.append(torch.cat([sent_S, mine_PSL[self.etp.index].sum(1), mine_PSL.sum((1, 2))]))
            start = block.stop
        assert start == sources * local
        # The one place where the host must know sizes: all of them in one transfer.
        return torch.stack(sizes).tolist(), counts

    def _plans(
        self, ordered: SortedChoices, sizes: list[list[int]], counts: list[Tensor], tokens: int
    ) -> tuple[list[ChunkPlan], Copies]:
        sources = self.ep.size
        copies = Copies.of_choices(ordered, sum(sum(s[:sources]) for s in sizes), tokens)
        plans = [
            ChunkPlan(copies, s[:sources], s[sources : 2 * sources], s[2 * sources :], counts_PSL)
            for s, counts_PSL in zip(sizes, counts, strict=True)
        ]
        return plans, copies

    def _padded(self, ordered: SortedChoices, x_TD: Tensor, weight_TK: Tensor, capacity: int) -> list[Parcel]:
        """Every rank sends every expert as many rows as an expert may serve of a rank's tokens."""
        tokens, k = weight_TK.shape
        sources, peers, device = self.ep.size, self.etp.size, x_TD.device
        start_E1 = (ordered.counts_E.cumsum(0) - ordered.counts_E).unsqueeze(1)
        place_1C = torch.arange(capacity, device=device).unsqueeze(0)
        filled_R = (place_1C < ordered.counts_E.unsqueeze(1)).flatten()
        index_R = (start_E1 + place_1C).flatten().clamp(max=max(0, tokens * k - 1))
        slot_R = ordered.slot_S[index_R] if tokens else index_R
        slot_R = torch.where(filled_R, slot_R, tokens * k)  # one past the last: an empty row
        rows = len(slot_R)
        row_S = torch.full((tokens * k + 1,), rows, dtype=torch.int64, device=device)
        row_S[slot_R] = torch.arange(rows, device=device)
        copies = Copies(slot_R // k, row_S[:-1].view(tokens, k), complete=False, padded=True)
        x_RD = permute(x_TD, copies)
        weight_R = torch.cat([weight_TK.reshape(-1), weight_TK.new_zeros(1)])[slot_R]
        parcels, first = [], 0
        for size in self._sizes:
            send = [size * capacity] * sources
            counts_PSL = torch.full((peers, sources, size), capacity, dtype=torch.int64, device=device)
            plan = ChunkPlan(copies, send, send, [sum(send)] * peers, counts_PSL, [peers * sources * capacity] * size)
            part = slice(first, first + sum(send))
            parcels.append(Parcel(x_RD[part], weight_R[part], plan))
            first = part.stop
        return parcels

    def token_dispatch(self, parcel: Parcel) -> Parcel:
        """``[R, D]`` to the ep ranks of their experts."""
        plan: ChunkPlan = parcel.plan
        there = Exchange(plan.send, plan.receive)
        travelling = (parcel.x, parcel.weight)
        (x_AD, weight_A), handle = start(travelling, (there, there), self.ep, yields=not plan.optional)
        return Parcel(x_AD, weight_A, plan, handle)

    def dispatch_postprocess(self, parcel: Parcel) -> tuple[Tensor, ExpertRows]:
        """To all etp ranks that hold a part of the expert; then by expert."""
        plan: ChunkPlan = parcel.plan
        x_AD, weight_A = wait((parcel.x, parcel.weight), parcel.handle)
        x_AD = comm.all_gather_uneven(x_AD, plan.arrived, self.etp)
        weight_A = comm.all_gather_uneven(weight_A, plan.arrived, self.etp)
        peers, sources, local = plan.counts_PSL.shape
        counts_L = plan.counts_PSL.sum((0, 1))
        if local <= 1 or peers * sources == 1:
            return x_AD, ExpertRows(None, weight_A, counts_L, True, plan.counts)
        token_M = expert_of_rows(plan.counts_PSL.reshape(-1, local), x_AD.shape[0]).argsort(stable=True)
        return x_AD, ExpertRows(token_M, take_distinct(weight_A, token_M), counts_L, True, plan.counts)

    # ---- and back ----------------------------------------------------------------------------------------------

    def combine_preprocess(self, y_AD: Tensor, plan: ChunkPlan) -> Tensor:
        """Sums the parts of each expert over etp."""
        return comm.reduce_scatter_uneven(y_AD, plan.arrived, self.etp)

    def token_combine(self, y_AD: Tensor, plan: ChunkPlan) -> Return:
        """Every row goes home."""
        (y_RD,), handle = start((y_AD,), (Exchange(plan.receive, plan.send),), self.ep, yields=not plan.optional)
        return Return(y_RD, handle)

    def combine_postprocess(self, returns: list[Return], plans: list[ChunkPlan]) -> Tensor:
        """Sums each token's rows."""
        parts = [part for back in returns for part in wait((back.y,), back.handle)]
        y_RD = parts[0] if len(parts) == 1 else torch.cat(parts)
        return unpermute(y_RD, plans[0].copies)


def _parcels(x_RD: Tensor, weight_TK: Tensor, slot_S: Tensor, plans: list[ChunkPlan]) -> list[Parcel]:
    rows = [sum(plan.send) for plan in plans]
    weight_R = take_distinct(weight_TK.reshape(-1), slot_S[: sum(rows)])
    if len(plans) == 1:  # the gradient of a split is a copy, even of a split into one
        return [Parcel(x_RD, weight_R, plans[0])]
    return [
        Parcel(x, weight, plan) for x, weight, plan in zip(x_RD.split(rows), weight_R.split(rows), plans, strict=True)
    ]


def _in_travelling_order(ordered: SortedChoices, shift_B: Tensor, rows_B: Tensor, rows: int) -> SortedChoices:
    """The served choices in the blocks in which they travel, the others behind them; its counts stay those of the experts."""
    place_R = shift_B.repeat_interleave(rows_B, output_size=rows) + torch.arange(rows, device=rows_B.device)
    slot_S = torch.cat([ordered.slot_S[place_R], ordered.slot_S[rows:]])
    return SortedChoices(slot_S, ordered.counts_E, ordered.top_k, rows)

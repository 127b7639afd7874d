# SPDX-License-Identifier: Apache-2.0
"""All-gather dispatch: every rank sees all tokens of the group and computes those its experts want.

    token_dispatch    all-gather-v over etp x ep (tokens; choices and weights)
    token_combine     reduce-scatter-v over etp x ep

Nothing is permuted and each token travels once to each rank, so it is the cheapest where a token's experts live on nearly
all ranks (top-k well above ep). On one rank nothing travels at all: experts read the tokens where they are, and this is
what every layer without expert parallelism runs.

The host waits for the device once a layer where there is more than one rank; on one rank only where tokens are dropped.

Copies of experts (:mod:`.placing`) find all tokens where they are: the second parcel, theirs, travels with the first.

Legend: see :mod:`.base`; G ranks of etp x ep.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_moefold import comm
from lightning_moefold.async_comm import Spread, SumUp, start, wait
from lightning_moefold.balance.copies import CopyPlan
from lightning_moefold.balance.fast import ExpertCopies
from lightning_moefold.dispatch.base import Choices, ExpertRows, Parcel, Return, TokenDispatcher
from lightning_moefold.dispatch.packing import pack, unpack
from lightning_moefold.dispatch.permutation import sort_by_expert, take_distinct
from lightning_moefold.dispatch.placing import place_choices


@dataclass(frozen=True)
class GatherPlan:
    """What is known before any token moves.

    Args:
        expert_TK: This rank's choices; E where nobody serves one.
        tokens: Tokens of each rank.
        served: Rows computed here; None where the host does not know.
        first: Number of the first expert here.
        held: Experts here.
        together: What the parcels of one pass share, where copies are planned.
    """

    expert_TK: Tensor
    tokens: list[int]
    served: int | None
    first: int
    held: int
    together: _Together | None = None

    @property
    def experts(self) -> CopyPlan | None:
        """Which experts have copies."""
        return None if self.together is None else self.together.experts


@dataclass
class _Together:
    """What the parcel of the experts at home and that of the copies share.

    Args:
        experts: Which experts have copies.

    Attributes:
        arrived: Tokens, weights and choices of all ranks.
        summed: What the experts at home have made of the tokens, while copies still compute.
    """

    experts: CopyPlan
    arrived: tuple[Tensor, Tensor, Tensor] | None = None
    summed: Tensor | None = None


class AllGatherDispatcher(TokenDispatcher):
    """All tokens to all ranks; see the module."""

    def dispatch_preprocess(self, x_TD: Tensor, choices: Choices) -> list[Parcel]:
        """See :meth:`.TokenDispatcher.dispatch_preprocess`."""
        if self.config.copies is not None and self.ep.size > 1:
            return self._with_copies(x_TD, choices, self.config.copies)
        weight_TK, expert_TK, kept_TK = choices.weight_TK, choices.expert_TK, choices.kept_TK
        tokens, k = expert_TK.shape
        marked_TK = expert_TK if kept_TK is None else expert_TK.masked_fill(~kept_TK, self.num_experts)
        if self.etp_ep.size == 1:
            served = tokens * k if kept_TK is None else choices.served
            return [Parcel(x_TD, weight_TK, GatherPlan(marked_TK, [tokens], served, 0, self.num_experts))]
        counts_E = torch.zeros(self.num_experts + 1, dtype=torch.int64, device=x_TD.device)
        counts_E.scatter_add_(0, marked_TK.reshape(-1), torch.ones_like(marked_TK).reshape(-1))
        counts_E[-1] = tokens
        counts_GE = comm.all_gather_raw(counts_E, self.etp_ep).view(self.etp_ep.size, -1)
        first = self.ep.index * self.local_experts
        mine = counts_GE[:, first : first + self.local_experts].sum().view(1)
        *all_tokens, rows = torch.cat([counts_GE[:, -1], mine]).tolist()
        return [Parcel(x_TD, weight_TK, GatherPlan(marked_TK, all_tokens, rows, first, self.local_experts))]

    def _with_copies(self, x_TD: Tensor, choices: Choices, options: ExpertCopies) -> list[Parcel]:
        placed = place_choices(choices, options, self)
        plan, rank, number_TK = placed.plan, self.ep.index, placed.choices.expert_TK
        if choices.kept_TK is not None:
            number_TK = number_TK.masked_fill(~choices.kept_TK, self.num_experts + self.ep.size * placed.each)
        together, borrowed = _Together(plan), plan.borrowed(rank)
        copied = int(plan.quota_RE[rank, borrowed].sum())
        here, first = int(plan.quota_RE[rank].sum()) - copied, rank * self.local_experts
        at_home = GatherPlan(number_TK, placed.tokens, here, first, self.local_experts, together)
        parcels = [Parcel(x_TD, choices.weight_TK, at_home)]
        if plan.copies:
            first = self.num_experts + rank * placed.each
            parcels.append(
                Parcel(
                    x_TD[:0], choices.weight_TK[:0], replace(at_home, served=copied, first=first, held=len(borrowed))
                )
            )
        return parcels

    def _is_of_copies(self, plan: GatherPlan) -> bool:
        return plan.first >= self.num_experts

    def token_dispatch(self, parcel: Parcel) -> Parcel:
        """``[T, D]`` of every rank to every rank."""
        plan: GatherPlan = parcel.plan
        if self.etp_ep.size == 1 or self._is_of_copies(plan):
            return parcel
        everywhere = Spread(plan.tokens)
        packed_TK2 = pack(parcel.weight, plan.expert_TK)
        (x_AD, packed_AK2), handle = start((parcel.x, packed_TK2), (everywhere, everywhere), self.etp_ep)
        return Parcel(x_AD, packed_AK2, plan, handle)

    def dispatch_postprocess(self, parcel: Parcel) -> tuple[Tensor, ExpertRows]:
        """Picks the choices that fall on the experts here."""
        plan: GatherPlan = parcel.plan
        held, together, k = plan.held, plan.together, plan.expert_TK.shape[1]
        x_AD, weight_AK, expert_AK = parcel.x, parcel.weight, plan.expert_TK
        if parcel.handle is not None:
            x_AD, packed_AK2 = wait((x_AD, weight_AK), parcel.handle)
            weight_AK, expert_AK = unpack(packed_AK2)
            if together is not None and together.experts.copies:
                together.arrived = x_AD, weight_AK, expert_AK
        elif together is not None and together.arrived is not None:
            (x_AD, weight_AK, expert_AK), together.arrived = together.arrived, None
        kept_AK, served = None, plan.served
        if self.etp_ep.size > 1 or served != expert_AK.numel():
            expert_AK = expert_AK - plan.first
            kept_AK = (expert_AK >= 0) & (expert_AK < held)
        ordered = sort_by_expert(expert_AK, held, kept_AK, served)
        rows = int(ordered.counts_E.sum()) if ordered.served is None else ordered.served
        slot_M = ordered.slot_S[:rows]
        weight_M = take_distinct(weight_AK.reshape(-1), slot_M)
        return x_AD, ExpertRows(slot_M // k, weight_M, ordered.counts_E, distinct=False)

    def combine_preprocess(self, y_AD: Tensor, plan: GatherPlan) -> Tensor:
        """Nothing: the sum over etp is part of the way home."""
        return y_AD

    def token_combine(self, y_AD: Tensor, plan: GatherPlan) -> Return:
        """Sums what the ranks have computed of each token, at its home; with copies, what both parcels have."""
        together = plan.together
        if together is not None and together.experts.copies:
            if not self._is_of_copies(plan):
                together.summed = y_AD
                return Return(y_AD.new_empty(0))
            assert together.summed is not None, "experts at home compute before copies do"
            y_AD, together.summed = together.summed + y_AD, None
        (y_TD,), handle = start((y_AD,), (SumUp(plan.tokens),), self.etp_ep)
        return Return(y_TD, handle)

    def combine_postprocess(self, returns: list[Return], plans: list[GatherPlan]) -> Tensor:
        """Nothing more: the tokens are whole."""
        return wait((returns[-1].y,), returns[-1].handle)[0]

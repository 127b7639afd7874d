# SPDX-License-Identifier: Apache-2.0
"""Choices of experts of which some compute on several ranks: who computes which choice, known before tokens move.

A choice that the owner of its expert computes keeps the expert's number. For the others the copies are numbered behind the E
experts, C for each rank whether it has so many or not, so that whoever sends tokens need know no more than these numbers.

Legend: see :mod:`.base`; R ranks of ep, S sources (etp peers of each rank adjacent), C copies that a rank may have.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lightning_moefold import comm
from lightning_moefold.balance.copies import CopyPlan, RowSplit
from lightning_moefold.balance.fast import ExpertCopies
from lightning_moefold.dispatch.base import Choices, TokenDispatcher
from lightning_moefold.dispatch.host import to_device
from lightning_moefold.dispatch.permutation import sort_by_expert


@dataclass(frozen=True)
class PlacedChoices:
    """Choices of this rank's tokens, and who computes them.

    Args:
        plan: Which rank computes how many rows of which expert.
        choices: The choices; ``expert_TK`` holds the number of an expert, or of a copy behind those of all experts.
        tokens: Tokens of each source.
        num_experts: E.
        each: C.
    """

    plan: CopyPlan
    choices: Choices
    tokens: list[int]
    num_experts: int
    each: int

    def at_home(self) -> Choices:
        """The choices that owners compute."""
        return self._some(self.choices.expert_TK < self.num_experts, 0)

    def copied(self) -> Choices:
        """The choices that copies compute, by the numbers of the copies from 0 on."""
        return self._some(self.choices.expert_TK >= self.num_experts, self.num_experts)

    def _some(self, which_TK: Tensor, first: int) -> Choices:
        kept_TK = which_TK if self.choices.kept_TK is None else which_TK & self.choices.kept_TK
        return replace(
            self.choices, expert_TK=(self.choices.expert_TK - first).clamp(min=0), kept_TK=kept_TK, served=None
        )


def place_choices(choices: Choices, options: ExpertCopies, dispatcher: TokenDispatcher) -> PlacedChoices:
    """Plans the copies of a pass, and gives each choice to a rank. Collective over etp x ep; the host waits for the device."""
    experts, ranks, each = dispatcher.num_experts, dispatcher.ep.size, options.max_copies_per_rank
    tokens, k = choices.expert_TK.shape
    ordered = sort_by_expert(choices.expert_TK, experts, choices.kept_TK, choices.served)
    mine = torch.cat([ordered.counts_E, ordered.counts_E.new_full((1,), tokens)])
    known = comm.all_gather_raw(mine, dispatcher.etp_ep).cpu().numpy().reshape(-1, experts + 1)
    counts_SE = known[:, :experts]
    plan = options.plan(counts_SE, ranks)

    sent_RE = RowSplit(counts_SE, plan).sent(dispatcher.ep.index * dispatcher.etp.size + dispatcher.etp.index)
    expert_B, rank_B = np.nonzero(sent_RE.T)  # blocks of rows in the order of experts, then of ranks
    copy_RE = plan.copied_RE.cumsum(1) - 1
    is_home_B = expert_B // plan.local_experts == rank_B
    number_B = np.where(is_home_B, expert_B, experts + rank_B * each + copy_RE[rank_B, expert_B])
    number, rows = to_device([number_B, sent_RE[rank_B, expert_B]], ordered.slot_S.device)
    served = int(counts_SE[dispatcher.ep.index * dispatcher.etp.size + dispatcher.etp.index].sum())
    number_TK = choices.expert_TK.reshape(-1).clone()
    number_TK[ordered.slot_S[:served]] = number.repeat_interleave(rows, output_size=served)
    placed = replace(choices, expert_TK=number_TK.view(tokens, k), served=served)
    return PlacedChoices(plan, placed, known[:, experts].tolist(), experts, each)

# SPDX-License-Identifier: Apache-2.0
"""Forced balance, for benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_moefold.modules.routers.registry import register_router
from lightning_moefold.modules.routers.router import Router
from lightning_moefold.modules.sequence import SequenceBatch


@register_router("force_balanced")
class ForceBalancedRouter(Router):
    """FOR BENCHMARKS ONLY: deals the experts to the tokens in turn, whatever the logits are.

    Neighbouring tokens get neighbouring experts, so that all loads are equal (to within a token). The weights are the
    router's for these experts, with gradients, so a step costs as much as with learned routing. The trained router is
    useless.
    """

    def choose(self, score_TE: Tensor, batch: SequenceBatch) -> Tensor:
        """Chooses by position and row only; see :meth:`Router.choose`."""
        row_T, position_T = batch.token_places(score_TE.device)
        slot_K = torch.arange(self.top_k, device=score_TE.device)
        return ((position_T * self.top_k + row_T).unsqueeze(-1) + slot_K) % self.num_experts

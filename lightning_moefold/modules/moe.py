# SPDX-License-Identifier: Apache-2.0
"""The Mixture-of-Experts layer.

Legend: T tokens of this rank, K experts per token, R rows sent, M rows computed here, D hidden size, E experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_moefold.dispatch import AllToAllDispatcher
from lightning_moefold.mesh import FoldedMesh
from lightning_moefold.modules.base import Linear, ParallelModule
from lightning_moefold.modules.experts import Experts
from lightning_moefold.modules.mlp import GatedMLP
from lightning_moefold.modules.router import Router, count_choices, routing_statistics
from lightning_moefold.modules.sequence import SequenceBatch


class MoELayer(ParallelModule):
    """Router, dispatcher, experts, and an optional shared expert; takes and returns ``[..., hidden_size]``.

    Args:
        hidden_size: D.
        num_experts: E.
        top_k: Experts per token.
        ffn_hidden_size: Width of each expert.
        normalize_weights: Divide a token's weights by their sum.
        shared_ffn_hidden_size: Width of a shared expert that every token visits; 0 for none.
        shared_gate: Scale the shared expert by ``sigmoid(shared_expert_gate(x))`` (Qwen2-MoE).
        activation: Of all experts.

    Attributes:
        load_E: How often each expert was chosen on this rank in training since somebody last reset it (int64; padding
            left out).
        dropped: How many of these choices no expert served, for want of capacity (int64 scalar; 0 while dropless).
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        ffn_hidden_size: int,
        *,
        normalize_weights: bool = True,
        shared_ffn_hidden_size: int = 0,
        shared_gate: bool = True,
        activation: str = "silu",
    ) -> None:
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k
        self.gate = Router(hidden_size, num_experts, top_k, normalize_weights)
        self.experts = Experts(hidden_size, num_experts, ffn_hidden_size, activation)
        self.shared_expert = (
            GatedMLP(hidden_size, shared_ffn_hidden_size, activation) if shared_ffn_hidden_size else None
        )
        self.shared_expert_gate = Linear(hidden_size, 1) if shared_ffn_hidden_size and shared_gate else None
        self.dispatcher = AllToAllDispatcher(num_experts)
        # Not buffers: those are made alike on all ranks before each step, and counters are each rank's own.
        self.load_E = torch.zeros(num_experts, dtype=torch.int64)
        self.dropped = torch.zeros((), dtype=torch.int64)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MoELayer:
        """Moves the counters with the layer; they begin anew."""
        super()._apply(fn, recurse)
        self.load_E, self.dropped = (
            torch.zeros_like(fn(counter), dtype=torch.int64) for counter in (self.load_E, self.dropped)
        )
        return self

    def bind(self, mesh: FoldedMesh) -> None:
        """Makes the dispatcher of this fold."""
        self.dispatcher = AllToAllDispatcher(self.num_experts, mesh.ep, mesh.etp, mesh.axis("etp_ep"))

    def forward(self, hidden: Tensor, batch: SequenceBatch | None = None) -> Tensor:
        """Routes each token through its experts.

        Args:
            hidden: ``[..., D]``; under a fold this rank's tokens ``[T, D]``.
            batch: What is padding, and where the routing statistics go.
        """
        x_TD = hidden.reshape(-1, hidden.shape[-1])
        weight_TK, expert_TK, probability_TE = self.gate(x_TD)
        self._record(expert_TK, probability_TE, batch)
        y_TD = self._routed(x_TD, weight_TK, expert_TK, batch)
        if self.shared_expert is not None:
            shared_TD = self.shared_expert(x_TD, batch)
            if self.shared_expert_gate is not None:
                shared_TD = self.shared_expert_gate(x_TD).sigmoid() * shared_TD
            y_TD = y_TD + shared_TD
        return y_TD.view_as(hidden)

    def _routed(self, x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor, batch: SequenceBatch | None) -> Tensor:
        dispatcher = self.dispatcher
        routed_T, num_routed = (None, None) if batch is None else (batch.routed_T, batch.num_routed)
        x_RD, plan = dispatcher.dispatch_preprocess(x_TD, expert_TK, routed_T, num_routed)
        x_MD = dispatcher.dispatch_postprocess(dispatcher.token_dispatch(x_RD, plan), plan)
        y_MD = dispatcher.combine_preprocess(self.experts(x_MD, plan.counts_L), plan)
        return dispatcher.combine_postprocess(dispatcher.token_combine(y_MD, plan), weight_TK, plan)

    def _record(self, expert_TK: Tensor, probability_TE: Tensor, batch: SequenceBatch | None) -> None:
        counts_ME = count_choices(expert_TK, self.num_experts, batch)
        if self.training:
            with torch.no_grad():
                self.load_E += counts_ME.sum(0)
        if batch is not None and batch.wants_routing:
            batch.routing = routing_statistics(probability_TE, counts_ME, batch)

# SPDX-License-Identifier: Apache-2.0
"""The router: which experts a token goes to, and with what weight.

Legend: T tokens, D hidden size, E experts, K experts per token, M micro-batches.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_moefold.modules.base import ParallelModule, local, wide
from lightning_moefold.modules.sequence import RoutingStatistics, SequenceBatch


class Router(ParallelModule):
    """Softmax over all experts, then top-k, in at least float32 whatever the precision of the model.

    Args:
        hidden_size: D.
        num_experts: E.
        top_k: K.
        normalize: Divide a token's K weights by their sum (Mixtral always does; Qwen: ``norm_topk_prob``).
    """

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, normalize: bool = True) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k={top_k} must lie between 1 and num_experts={num_experts}.")
        self.num_experts, self.top_k, self.normalize = num_experts, top_k, normalize
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Chooses experts.

        Returns:
            Weights ``[T, K]`` and probabilities ``[T, E]`` in at least float32, and the experts ``[T, K]`` (int64), in
            the order weights, experts, probabilities.
        """
        dtype = wide(x_TD.dtype)
        with torch.autocast(x_TD.device.type, enabled=False):  # it would compute the product in 16 bits
            logits_TE = F.linear(x_TD.to(dtype), local(self.weight).to(dtype))
        probability_TE = logits_TE.softmax(-1)
        weight_TK, expert_TK = probability_TE.topk(self.top_k, dim=-1)
        if self.normalize:
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        return weight_TK, expert_TK, probability_TE


def count_choices(expert_TK: Tensor, num_experts: int, batch: SequenceBatch) -> Tensor:
    """How often each expert is chosen by tokens that count, ``[M, E]`` int64; never waits for the device."""
    bin_TK = expert_TK
    if batch.microbatch_T is not None:
        bin_TK = expert_TK + batch.microbatch_T.unsqueeze(-1) * num_experts
    weight_TK = torch.ones_like(expert_TK)
    if batch.counted_T is not None:
        weight_TK = weight_TK * batch.counted_T.unsqueeze(-1)
    counts = torch.zeros(batch.num_microbatches * num_experts, dtype=torch.int64, device=expert_TK.device)
    return counts.scatter_add_(0, bin_TK.reshape(-1), weight_TK.reshape(-1)).view(batch.num_microbatches, num_experts)


def routing_statistics(probability_TE: Tensor, counts_ME: Tensor, batch: SequenceBatch) -> RoutingStatistics:
    """Sums the probabilities of the tokens that count, per micro-batch (differentiable)."""
    if batch.counted_T is not None:
        probability_TE = probability_TE * batch.counted_T.unsqueeze(-1)
    if batch.microbatch_T is None:
        return RoutingStatistics(counts_ME, probability_TE.sum(0, keepdim=True))
    probability_ME = probability_TE.new_zeros(counts_ME.shape).index_add(0, batch.microbatch_T, probability_TE)
    return RoutingStatistics(counts_ME, probability_ME)

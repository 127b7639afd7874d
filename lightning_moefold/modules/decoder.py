# SPDX-License-Identifier: Apache-2.0
"""A pre-norm decoder layer: ``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_moefold.modules.alone import run_alone
from lightning_moefold.modules.attention import Attention
from lightning_moefold.modules.base import ParallelRoot
from lightning_moefold.modules.mlp import GatedMLP
from lightning_moefold.modules.moe import MoELayer
from lightning_moefold.modules.norm import RMSNorm
from lightning_moefold.modules.recompute import Recompute, recomputed
from lightning_moefold.modules.sequence import SequenceBatch


class DecoderLayer(ParallelRoot):
    """Attention and a feed-forward block (MoE or dense), each behind an RMSNorm and a residual.

    Args:
        hidden_size: D.
        attention: The attention block.
        mlp: The MoE layer, or a dense gated feed-forward layer.
        norm_eps: Epsilon of both norms.

    Attributes:
        recompute: What runs again in backward instead of being kept: ``"full"`` the whole layer, ``"selective"`` its
            attention half (the other half communicates, and experts make their activations again in any case); None for
            nothing.
    """

    recompute: Recompute | None = None

    def __init__(
        self, hidden_size: int, attention: Attention, mlp: MoELayer | GatedMLP, norm_eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.input_layernorm = RMSNorm(hidden_size, norm_eps)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(hidden_size, norm_eps)
        self.mlp = mlp

    def forward(self, hidden: Tensor, batch: SequenceBatch | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """``[T, D] -> [T, D]`` with a batch description; ``[B, S, D] -> [B, S, D]`` without, at positions 0, 1, ...

        Where the batch asks for routing statistics, an MoE layer's table of them (:mod:`.routers.statistics`) comes with
        the hidden states: FSDP2 watches what a layer returns, and backward through anything else could reach weights that
        it has let go of.
        """
        if batch is None:
            return run_alone(self, hidden, self.self_attn.batch_of(hidden, self.compute_dtype))
        if self.recompute == "full" and torch.is_grad_enabled():
            return recomputed(self._forward, hidden, batch)
        return self._forward(hidden, batch)

    def _forward(self, hidden: Tensor, batch: SequenceBatch) -> Tensor | tuple[Tensor, Tensor]:
        selective = self.recompute == "selective" and torch.is_grad_enabled()
        hidden = recomputed(self._attend, hidden, batch) if selective else self._attend(hidden, batch)
        hidden = hidden + self.mlp(self.post_attention_layernorm(hidden), batch)
        if batch.routing is None:
            return hidden
        routing_SE, batch.routing = batch.routing, None
        return hidden, routing_SE

    def _attend(self, hidden: Tensor, batch: SequenceBatch) -> Tensor:
        return hidden + self.self_attn(self.input_layernorm(hidden), batch)

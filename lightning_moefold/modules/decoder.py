# SPDX-License-Identifier: Apache-2.0
"""A pre-norm decoder layer: ``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_moefold.modules.attention import Attention
from lightning_moefold.modules.base import ParallelRoot
from lightning_moefold.modules.mlp import GatedMLP
from lightning_moefold.modules.moe import MoELayer
from lightning_moefold.modules.norm import RMSNorm
from lightning_moefold.modules.recompute import Recompute, recomputed
from lightning_moefold.modules.sequence import SequenceBatch
from lightning_moefold.modules.standalone import run_standalone

Output = Tensor | tuple[Tensor, Tensor]


class _Halves(NamedTuple):
    """What a layer computes, and its two halves, each ``(hidden, batch)`` to hidden states."""

    whole: Callable[[Tensor, SequenceBatch], Output]
    attend: Callable[[Tensor, SequenceBatch], Tensor]
    feed: Callable[[Tensor, SequenceBatch], Output]


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
    _compiled: _Halves | None = None
    _broken: _Halves | None = None  # the same, for batches that break graphs

    def __init__(
        self, hidden_size: int, attention: Attention, mlp: MoELayer | GatedMLP, norm_eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.input_layernorm = RMSNorm(hidden_size, norm_eps)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(hidden_size, norm_eps)
        self.mlp = mlp

    def forward(self, hidden: Tensor, batch: SequenceBatch | None = None) -> Output:
        """``[T, D] -> [T, D]`` with a batch description; ``[B, S, D] -> [B, S, D]`` without, at positions 0, 1, ...

        Where the batch asks for routing statistics, an MoE layer's table of them (:mod:`.routers.statistics`) comes with
        the hidden states: FSDP2 watches what a layer returns, and backward through anything else could reach weights that
        it has let go of.
        """
        if batch is None:
            return run_standalone(self, hidden, self.self_attn.batch_of(hidden, self.compute_dtype))
        halves = self._halves(hidden, batch)
        if self.recompute is None or not torch.is_grad_enabled():
            return halves.whole(hidden, batch)
        if self.recompute == "full":
            return recomputed(halves.whole, hidden, batch)
        return halves.feed(recomputed(halves.attend, hidden, batch), batch)

    def compile(self, *args: Any, fullgraph: bool = False, **kwargs: Any) -> None:
        """Compiles what the layer computes, in place: names of parameters, checkpoints and hooks stay as they are.

        Layers of one kind share a graph. What is recomputed is compiled as a part of its own and called again in backward,
        so that every rank runs the same collectives again, as it does without compilation.

        Args:
            *args: As :func:`torch.compile` takes them.
            fullgraph: Raise an error where a graph breaks, on batches whose attention needs no mask.
            **kwargs: Likewise.
        """

        def compiled(whole: bool) -> _Halves:
            parts: Any = [torch.compile(part, *args, fullgraph=whole, **kwargs) for part in self._eager]
            return _Halves(*parts)

        self._compiled, self._broken = compiled(fullgraph), compiled(False)

    def uncompile(self) -> None:
        """Runs what the layer computes as it is again."""
        self._compiled = self._broken = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or a pickle, is not compiled."""
        return {name: value for name, value in super().__getstate__().items() if name not in ("_compiled", "_broken")}

    def _halves(self, hidden: Tensor, batch: SequenceBatch) -> _Halves:
        """What runs: nothing compiled where text is generated, or where a rank without tokens stands in for others."""
        if self._compiled is None or self._broken is None or batch.cache is not None or hidden.shape[0] == 0:
            return self._eager
        # Made inside a graph, these would make a graph of its own for the first layer of a batch, and for its second run.
        batch.visibility(self.self_attn.sliding_window)
        if isinstance(self.mlp, MoELayer):
            self.mlp.prepare(batch, hidden.device)
        return self._compiled if self.self_attn.is_one_kernel(batch) else self._broken

    @property
    def _eager(self) -> _Halves:
        return _Halves(self._whole, self._attend, self._feed)

    def _whole(self, hidden: Tensor, batch: SequenceBatch) -> Output:
        return self._feed(self._attend(hidden, batch), batch)

    def _attend(self, hidden: Tensor, batch: SequenceBatch) -> Tensor:
        return hidden + self.self_attn(self.input_layernorm(hidden), batch)

    def _feed(self, hidden: Tensor, batch: SequenceBatch) -> Output:
        output = self.mlp(self.post_attention_layernorm(hidden), batch)
        if not isinstance(output, tuple):
            return hidden + output
        change, routing_SE = output
        return hidden + change, routing_SE

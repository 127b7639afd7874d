# SPDX-License-Identifier: Apache-2.0
"""A pre-norm decoder layer: ``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_moefold.modules.attention import Attention
from lightning_moefold.modules.base import ParallelRoot
from lightning_moefold.modules.dropped import DroppedTensors, dropped
from lightning_moefold.modules.mlp import GatedMLP
from lightning_moefold.modules.moe import MoELayer
from lightning_moefold.modules.norm import RMSNorm
from lightning_moefold.modules.offload import OffloadedLayer
from lightning_moefold.modules.recompute import recomputed
from lightning_moefold.modules.recompute_parts import LAYER, Recompute, half_is_recomputed, recompute_parts
from lightning_moefold.modules.sequence import SequenceBatch
from lightning_moefold.modules.standalone import run_standalone

Output = Tensor | tuple[Tensor, Tensor]


class _Halves(NamedTuple):
    """The functions of a layer: the whole layer and its two halves, each from ``(hidden, batch)`` to hidden states."""

    whole: Callable[[Tensor, SequenceBatch], Output]
    attend: Callable[[Tensor, SequenceBatch], Tensor]
    feed: Callable[[Tensor, SequenceBatch], Output]


class DecoderLayer(ParallelRoot):
    """Attention and a feed-forward block (MoE or dense), each behind an RMSNorm and a residual.

    Args:
        hidden_size: Size of hidden states, D.
        attention: The attention block.
        mlp: The MoE layer, or a dense gated feed-forward layer.
        norm_eps: Epsilon of both norms.

    Attributes:
        recompute: The parts that are recomputed in backward instead of keeping activations: ``"full"`` for the whole
            layer; ``"selective"`` for ``["attention"]``, its attention half; a list of parts; None for nothing. ``"moe"``
            and ``"mlp"`` are the other half of a layer with experts, and of a dense one; ``"norm"`` is the output of the
            norms, for the halves that are not recomputed; ``"expert_activation"`` are the experts' gate and up
            products, which they recompute themselves.
        offload: Whether what is kept for backward goes to host memory.
        counts_adapter_calls: Whether the layer counts training calls (``adapter_call``, int64 scalar), for the dropout of an
            adapter.
    """

    recompute: Recompute | None = None
    offload: bool = False
    adapter_call: Tensor
    counts_adapter_calls: bool = False
    _compiled: _Halves | None = None
    _broken: _Halves | None = None  # compiled for batches whose attention breaks the graph

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
        """Runs the layer: ``[T, D] -> [T, D]`` with a batch description; without, ``[B, S, D] -> [B, S, D]`` at positions 0, 1, ...

        If the batch asks for routing statistics, a layer with experts also returns its table
        (:mod:`.routers.statistics`). It must be a return value, because FSDP2 hooks the outputs of a layer; backward
        through any other tensor could use weights that FSDP2 has already freed.
        """
        if batch is None:
            return run_standalone(self, hidden, self.self_attn.batch_of(hidden, self.compute_dtype))
        halves = self._halves(hidden, batch)
        if not torch.is_grad_enabled():
            return halves.whole(hidden, batch)
        if not self.offload:
            return self._run(halves, hidden, batch)
        with OffloadedLayer(self, batch.offloaded) as batch.offloaded:
            return self._run(halves, hidden, batch, batch.offloaded)

    def _run(
        self, halves: _Halves, hidden: Tensor, batch: SequenceBatch, offloaded: OffloadedLayer | None = None
    ) -> Output:
        """Runs the halves, each keeping for backward what :attr:`recompute` leaves."""
        if self.recompute is None:
            return halves.whole(hidden, batch)
        parts = recompute_parts(self.recompute)
        if LAYER in parts:
            return recomputed(halves.whole, hidden, batch)
        kept: Callable[..., Any] = partial(_without_norms, offloaded) if "norm" in parts else _called
        attend: Callable[..., Any] = recomputed if "attention" in parts else kept
        feed: Callable[..., Any] = recomputed if half_is_recomputed(parts, isinstance(self.mlp, MoELayer)) else kept
        return feed(halves.feed, attend(halves.attend, hidden, batch), batch)

    def count_adapter_calls(self) -> None:
        """Counts training calls from now on, in a buffer: dropout of an adapter differs from call to call."""
        device, self.counts_adapter_calls = self.input_layernorm.weight.device, True
        self.register_buffer("adapter_call", torch.zeros((), dtype=torch.int64, device=device))

    def next_adapter_call(self) -> Tensor | None:
        """Returns the number of this training call, if it is counted; it advances in each call with gradients."""
        if not self.counts_adapter_calls or not self.training:
            return None
        number = self.adapter_call.clone()
        if torch.is_grad_enabled():
            self.adapter_call += 1
        return number

    def compile(self, *args: Any, fullgraph: bool = False, **kwargs: Any) -> None:
        """Compiles the layer in place: names of parameters, checkpoints and hooks do not change.

        Layers of the same kind share a graph. The recomputed part is compiled separately and called again in backward,
        so that every rank runs the same collectives again, as without compilation.

        Args:
            *args: Positional arguments of :func:`torch.compile`.
            fullgraph: Whether a graph break is an error, on batches whose attention needs no mask.
            **kwargs: Keyword arguments of :func:`torch.compile`.
        """

        def compiled(whole: bool) -> _Halves:
            parts: Any = [torch.compile(part, *args, fullgraph=whole, **kwargs) for part in self._eager]
            return _Halves(*parts)

        self._compiled, self._broken = compiled(fullgraph), compiled(False)

    def uncompile(self) -> None:
        """Makes the layer run without compiled code again."""
        self._compiled = self._broken = None

    def __getstate__(self) -> dict[str, Any]:
        """Leaves compiled code out of copies and pickles."""
        return {name: value for name, value in super().__getstate__().items() if name not in ("_compiled", "_broken")}

    def _halves(self, hidden: Tensor, batch: SequenceBatch) -> _Halves:
        """Chooses the functions to run; generation, and stand-in calls without tokens, use no compiled code."""
        if self._compiled is None or self._broken is None or batch.cache is not None or hidden.shape[0] == 0:
            return self._eager
        # Computed here, because inside a graph they would cause separate graphs for a batch's first layer and for
        # recomputation.
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
        return hidden + self.self_attn(dropped(self.input_layernorm, hidden), batch)

    def _feed(self, hidden: Tensor, batch: SequenceBatch) -> Output:
        output = self.mlp(dropped(self.post_attention_layernorm, hidden), batch)
        if not isinstance(output, tuple):
            return hidden + output
        change, routing_SE = output
        return hidden + change, routing_SE


def _without_norms(
    offloaded: OffloadedLayer | None, half: Callable[..., Any], hidden: Tensor, batch: SequenceBatch
) -> Any:
    """Calls a half of a layer, of which the output of the norm is not kept."""
    with DroppedTensors(offloaded):
        return half(hidden, batch)


def _called(half: Callable[..., Any], hidden: Tensor, batch: SequenceBatch) -> Any:
    return half(hidden, batch)

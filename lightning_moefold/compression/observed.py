# SPDX-License-Identifier: Apache-2.0
"""Experts that show an observer what they compute, while they compute it.

Each (token, expert) row is computed on the one rank that holds the expert's slice, so sums over rows on all ranks are sums
over all tokens, under every fold. Padding is routed nowhere and therefore never seen.

Legend: A tokens that arrived, M rows in expert order, c rows of one expert, L local experts, D hidden size, F expert width
(cut over etp), N tokens of a tp group's rows, T tokens of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_moefold import comm
from lightning_moefold.dispatch import ExpertRows
from lightning_moefold.mesh import SINGLE, Axis
from lightning_moefold.modules import DecoderLayer, GatedMLP, MoELayer
from lightning_moefold.modules.base import Linear
from lightning_moefold.modules.experts import Experts
from lightning_moefold.modules.experts.kernels import ROWS_AT_A_TIME
from lightning_moefold.modules.experts.products import host_counts
from lightning_moefold.modules.sequence import SequenceBatch


class Observer:
    """What is told of the rows of a layer. A subclass overrides what it needs.

    Attributes:
        wants_outputs: Whether :meth:`see_output` is called, for which outputs are summed over etp.
    """

    wants_outputs = False

    def see_inner(self, expert: int, first: int, inner_cF: Tensor, weight_c: Tensor) -> None:
        """Sees some rows of a routed expert before the down projection.

        Args:
            expert: Its number in the layer.
            first: Its first channel on this rank.
            inner_cF: ``act(gate(x)) * up(x)``, without the router weight.
            weight_c: Router weight of each row, in at least float32.
        """

    def see_output(self, expert: int, output_cD: Tensor, weight_c: Tensor) -> None:
        """Sees the whole outputs of some rows of a routed expert, without the router weight, on one rank of its etp group."""

    def see_shared(self, first: int, inner_NF: Tensor, weight_N: Tensor) -> None:
        """Sees the shared expert on all tokens of a tp group; arguments are those of :meth:`see_inner`."""


class ObservedExperts(Experts):
    """Gated experts that show their rows.

    Args:
        like: The experts that these replace; their parameters have the same shapes.
        observer: Is told of each row.
    """

    def __init__(self, like: Experts, observer: Observer) -> None:
        experts, width, hidden = like.gate_proj.shape
        super().__init__(hidden, experts, width)
        self.activation, self.observer = like.activation, observer

    def compute(self, x_AD: Tensor, rows: ExpertRows, stacks: Sequence[Tensor], chunk: int = 0) -> Tensor:
        """See :meth:`.RoutedExperts.compute`."""
        gate_LFD, up_LFD, down_LDF = stacks
        etp = SINGLE if self.mesh is None else self.mesh.etp
        ep = SINGLE if self.mesh is None else self.mesh.ep
        first_expert, first_channel = ep.index * len(gate_LFD), etp.index * gate_LFD.shape[1]
        total_AD = x_AD.new_zeros(x_AD.shape, dtype=torch.promote_types(x_AD.dtype, torch.float32))
        start = 0
        for expert, count in enumerate(host_counts(rows)):
            for begin in range(start, start + count, ROWS_AT_A_TIME):
                part = slice(begin, min(begin + ROWS_AT_A_TIME, start + count))
                token_c = torch.arange(part.start, part.stop, device=x_AD.device)
                token_c = token_c if rows.token_M is None else rows.token_M[part]
                x_cD, weight_c = x_AD[token_c], rows.weight_M[part]
                inner_cF = self.activation(x_cD @ gate_LFD[expert].t()) * (x_cD @ up_LFD[expert].t())
                output_cD = inner_cF @ down_LDF[expert].t()
                self.observer.see_inner(first_expert + expert, first_channel, inner_cF, weight_c)
                if self.observer.wants_outputs:
                    whole_cD = comm.all_reduce_raw(output_cD.double(), etp)
                    if etp.index == 0:
                        self.observer.see_output(first_expert + expert, whole_cD, weight_c)
                total_AD.index_add_(0, token_c, (output_cD * weight_c.unsqueeze(1)).to(total_AD.dtype))
            start += count
        return total_AD.to(x_AD.dtype)


class ObservedSharedExpert(GatedMLP):
    """A shared expert that shows its channels, weighed by the layer's gate.

    Args:
        like: The shared expert that this one replaces.
        gate: The layer's gate of the shared expert; None if its output is added as it is.
        observer: Is told of each token.
    """

    def __init__(self, like: GatedMLP, gate: Linear | None, observer: Observer) -> None:
        super().__init__(like.hidden_size, like.ffn_hidden_size)
        self.activation, self.observer = like.activation, observer
        self._gate = (gate,)  # in a tuple, since its parameters are the layer's

    def forward(
        self, x: Tensor, batch: SequenceBatch | None = None, halfway: Callable[[], None] | None = None
    ) -> Tensor:
        """See :meth:`.GatedMLP.forward`."""
        assert batch is not None
        x_ND = batch.gather(x)
        inner_NF = self.activation(self.gate_proj(x_ND)) * self.up_proj(x_ND)
        gate = self._gate[0]
        weight_N = x_ND.new_ones(len(x_ND)) if gate is None else gate(x_ND).sigmoid().squeeze(1)
        seen_NF, seen_N = inner_NF, weight_N
        if batch.counted_T is not None:
            real_N = batch.gather(batch.counted_T.to(x.dtype).unsqueeze(1)).squeeze(1) > 0
            seen_NF, seen_N = inner_NF[real_N], weight_N[real_N]
        self.observer.see_shared(self.tp.index * inner_NF.shape[1], seen_NF, seen_N)
        if halfway is not None:
            halfway()
        return batch.reduce_scatter(self.down_proj(inner_NF))


def observe(layer: DecoderLayer, observer: Observer) -> None:
    """Has the experts of a layer show their rows; to be called before the layer is cut and read."""
    moe = layer.mlp
    assert isinstance(moe, MoELayer)
    assert isinstance(moe.experts, Experts)
    moe.experts = ObservedExperts(moe.experts, observer)
    if moe.shared_expert is not None:
        moe.shared_expert = ObservedSharedExpert(moe.shared_expert, moe.shared_expert_gate, observer)


class MicroExpertSums(Observer):
    """Sum and maximum of ``phi^2`` over tokens, in float64, for each channel of a layer.

    Args:
        experts: E.
        width: F of the whole expert.
        shared_width: F of the shared expert; 0 without one.
        device: Where the rows are.
    """

    def __init__(self, experts: int, width: int, shared_width: int, device: torch.device) -> None:
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self.square_EF, self.most_EF = zeros(experts, width), zeros(experts, width)
        self.shared_square_F, self.shared_most_F = zeros(shared_width), zeros(shared_width)
        self.load_E = zeros(experts)

    def see_inner(self, expert: int, first: int, inner_cF: Tensor, weight_c: Tensor) -> None:
        """See :meth:`Observer.see_inner`."""
        part = slice(first, first + inner_cF.shape[1])
        _add(self.square_EF[expert, part], self.most_EF[expert, part], inner_cF, weight_c)
        if first == 0:
            self.load_E[expert] += len(weight_c)

    def see_shared(self, first: int, inner_NF: Tensor, weight_N: Tensor) -> None:
        """See :meth:`Observer.see_shared`."""
        part = slice(first, first + inner_NF.shape[1])
        for inner_cF, weight_c in zip(inner_NF.split(ROWS_AT_A_TIME), weight_N.split(ROWS_AT_A_TIME), strict=True):
            _add(self.shared_square_F[part], self.shared_most_F[part], inner_cF, weight_c)

    def reduce(self, world: Axis) -> None:
        """Sums over all ranks. Collective."""
        sums, most = [self.square_EF, self.shared_square_F, self.load_E], [self.most_EF, self.shared_most_F]
        reduce_all(sums, world, dist.ReduceOp.SUM)
        reduce_all(most, world, dist.ReduceOp.MAX)


def reduce_all(tensors: Sequence[Tensor], world: Axis, operation: dist.ReduceOp.RedOpType) -> None:
    """Reduces tensors over all ranks in one collective, in place."""
    if world.size == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat, operation, group=world.group)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def _add(square_F: Tensor, most_F: Tensor, inner_cF: Tensor, weight_c: Tensor) -> None:
    if not len(inner_cF):
        return
    squared_cF = (inner_cF.double() * weight_c.double().unsqueeze(1)).square_()
    square_F += squared_cF.sum(0)
    torch.maximum(most_F, squared_cF.amax(0), out=most_F)

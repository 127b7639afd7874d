# SPDX-License-Identifier: Apache-2.0
"""SequenceBatch: what the layers must know about a batch besides its hidden states.

Between blocks the hidden states are just tokens: the rows of a batch are flattened to N = B * S tokens, padded to a
multiple of tp, and each tensor parallel rank holds T of them (sequence parallelism). Nothing but attention cares where
a row ends, so nothing is communicated between attention and MoE.

Legend: B rows, S positions per row, N = B * S, P = N padded to a multiple of tp, T = P / tp, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_moefold import comm
from lightning_moefold.mesh import SINGLE, Axis


@dataclass
class RoutingStatistics:
    """What the auxiliary loss needs of one layer, for this rank's tokens.

    Args:
        counts_ME: Choices of each expert per micro-batch, int64.
        probability_ME: Sum of the router's probabilities per micro-batch; differentiable.
    """

    counts_ME: Tensor
    probability_ME: Tensor


class SequenceBatch:
    """Shape, positions and masks of a batch on this rank.

    Not a dataclass, on purpose: FSDP2 copies dataclasses that pass through a wrapped module, and statistics put into a
    copy would be lost.

    Args:
        rows: B.
        length: S.
        cos_BSh: Rotary table, or None where positions are not used.
        sin_BSh: Likewise.
        tp: Tensor parallel axis over which the tokens are spread.

    Attributes:
        mask_BSS: Which key each query may see beyond what causality says, bool, broadcastable over rows; None for all.
        routed_T: False for tokens that go to no expert; None if all go.
        num_routed: How many of ``routed_T`` are True, so that no layer has to ask the device.
        counted_T: False for tokens that routing statistics leave out; None if all count.
        microbatch_T: Micro-batch of each token; None where there is one.
        num_microbatches: M.
        wants_routing: Whether somebody asks for routing statistics.
        routing: Where an MoE layer puts its statistics, for its decoder layer to return.
    """

    def __init__(
        self, rows: int, length: int, cos_BSh: Tensor | None = None, sin_BSh: Tensor | None = None, *, tp: Axis = SINGLE
    ) -> None:
        self.rows, self.length, self.tp = rows, length, tp
        self.cos_BSh, self.sin_BSh = cos_BSh, sin_BSh
        self.mask_BSS: Tensor | None = None
        self.routed_T: Tensor | None = None
        self.num_routed: int | None = None
        self.counted_T: Tensor | None = None
        self.microbatch_T: Tensor | None = None
        self.num_microbatches = 1
        self.wants_routing = False
        self.routing: RoutingStatistics | None = None
        self._windowed: dict[int, Tensor] = {}

    @property
    def tokens(self) -> int:
        """N, without padding."""
        return self.rows * self.length

    @property
    def padding(self) -> int:
        """P - N."""
        return -self.tokens % self.tp.size

    def pad(self, x_ND: Tensor, value: float = 0) -> Tensor:
        """``[N, ...] -> [P, ...]``."""
        if self.padding == 0:
            return x_ND
        return F.pad(x_ND, [0, 0] * (x_ND.dim() - 1) + [0, self.padding], value=value)

    def shard(self, x_ND: Tensor, value: float = 0) -> Tensor:
        """This rank's tokens, ``[N, ...] -> [T, ...]`` (a cut: every rank already holds all of them)."""
        if self.tp.size == 1:
            return x_ND
        x_PD = self.pad(x_ND, value)
        part = x_PD.shape[0] // self.tp.size
        return x_PD.narrow(0, self.tp.index * part, part)

    def gather(self, x_TD: Tensor) -> Tensor:
        """All tokens of the tp group, ``[T, D] -> [N, D]``; gradients of the ranks are summed."""
        return comm.all_gather(x_TD, self.tp)[: self.tokens]

    def enter(self, x_ND: Tensor) -> Tensor:
        """From tokens that every tp rank has to this rank's, ``[N, D] -> [T, D]``; gradients come back whole."""
        return comm.split_identical(self.pad(x_ND), self.tp)

    def leave(self, x_TD: Tensor) -> Tensor:
        """The inverse of :meth:`enter`, ``[T, D] -> [N, D]``: all tp ranks go on to compute the same."""
        return comm.gather_identical(x_TD, self.tp)[: self.tokens]

    def reduce_scatter(self, x_ND: Tensor) -> Tensor:
        """Sums partial results over tp and keeps this rank's tokens, ``[N, D] -> [T, D]``."""
        return comm.reduce_scatter(self.pad(x_ND), self.tp)

    def mask_for(self, window: int | None, device: torch.device) -> Tensor | None:
        """The mask ``[B or 1, 1, S, S]``, or None where plain causal attention does.

        True means that the query may attend; causality is included.

        Args:
            window: A query sees at most this many keys, itself included; None for all.
            device: Where to make it.
        """
        limited = window is not None and window < self.length
        if self.mask_BSS is None and not limited:
            return None
        key = window if limited and window is not None else 0
        if key not in self._windowed:
            place_S = torch.arange(self.length, device=device)
            distance_SS = place_S[:, None] - place_S[None, :]
            allowed = distance_SS >= 0
            if limited:
                allowed = allowed & (distance_SS < key)
            allowed = allowed.unsqueeze(0)
            if self.mask_BSS is not None:
                # A padded query sees at least itself: what kernels make of a row without any key differs, NaN included.
                allowed = (allowed & self.mask_BSS) | (distance_SS == 0)
            self._windowed[key] = allowed.unsqueeze(1)
        return self._windowed[key]


def visible_keys(attention_mask_BS: Tensor | None, document_BS: Tensor | None) -> Tensor | None:
    """Which keys a query may see, causality aside: real tokens, of its own document. ``[B, 1 or S, S]`` bool, or None."""
    visible = None
    if attention_mask_BS is not None:
        visible = attention_mask_BS.bool().unsqueeze(1)
    if document_BS is not None:
        same = document_BS.unsqueeze(2) == document_BS.unsqueeze(1)
        visible = same if visible is None else visible & same
    return visible

# SPDX-License-Identifier: Apache-2.0
"""Rows of a custom network, cut over context parallel ranks between its ends.

Outside, every cp rank has whole rows and computes the same, as tp ranks do; inside, each has its positions. The strategy
multiplies a loss by ``1 / (dp * cp)`` and sums gradients over all these ranks. Outside, where cp ranks find the same
gradient, that is an average over dp. Inside, a rank's gradient is that of its positions alone: so it is made cp times as
large where rows are joined, and the gradients that leave at the other end are divided by cp again.

Legend: B rows, S positions, L positions of this cp rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_moefold import comm
from lightning_moefold.errors import InputError
from lightning_moefold.mesh import Axis
from lightning_moefold.modules.attention.exchanges import Exchange, padded_length
from lightning_moefold.modules.attention.layout import ContextLayout
from lightning_moefold.modules.base import ParallelRoot


@dataclass(frozen=True)
class RowCut:
    """How the rows are cut that a block is given.

    Args:
        layout: Which positions are on this rank; S is padded there.
        true_length: S as the network has it.
        exchange: How attention works over cp.
    """

    layout: ContextLayout
    true_length: int
    exchange: Exchange = "auto"

    @staticmethod
    def of(shape: Sequence[int], cp: Axis, exchange: Exchange = "auto") -> RowCut | None:
        """The cut of hidden states of a shape; None where one rank has whole rows.

        Raises:
            ValueError: If the shape has no positions.
        """
        if cp.size == 1:
            return None
        if len(shape) < 3:
            raise InputError(
                f"embed must return hidden states [rows, length, ...] for context parallelism to cut, not {list(shape)}; use "
                "context_parallel_size=1."
            )
        return RowCut(ContextLayout(padded_length(shape[1], cp.size), cp), shape[1], exchange)

    @property
    def length(self) -> int:
        """L."""
        return self.layout.length // self.layout.cp.size

    @property
    def is_padded(self) -> bool:
        """Whether some positions are padding."""
        return self.layout.length > self.true_length

    def real_N(self, rows: int, device: torch.device) -> Tensor:
        """Which of this rank's tokens are no padding, ``[B * L]``."""
        return (self.layout.positions(device) < self.true_length).repeat(rows)

    def enter(self, x_BSD: Tensor) -> Tensor:
        """``[B, S, ...] -> [B, L, ...]``, padded with zeros."""
        cp = self.layout.cp.size
        return comm.linear(x_BSD, lambda x: _positions(x, self), lambda grad: _whole(grad, self) / cp)

    def leave(self, x_BLD: Tensor) -> Tensor:
        """``[B, L, ...] -> [B, S, ...]`` on every cp rank, without the padding."""
        cp = self.layout.cp.size
        return comm.linear(x_BLD, lambda x: _whole(x, self), lambda grad: _positions(grad, self) * cp)


def tell_blocks(blocks: Iterable[ParallelRoot], cut: RowCut | None) -> None:
    """Tells blocks how the rows are cut that they are given from now on."""
    for block in blocks:
        block.rows = cut


def _positions(x_BSD: Tensor, cut: RowCut) -> Tensor:
    padding = cut.layout.length - x_BSD.shape[1]
    if padding:
        x_BSD = torch.cat([x_BSD, x_BSD.new_zeros(x_BSD.shape[0], padding, *x_BSD.shape[2:])], dim=1)
    return x_BSD.index_select(1, cut.layout.positions(x_BSD.device))


def _whole(x_BLD: Tensor, cut: RowCut) -> Tensor:
    x_SBD = comm.all_gather_raw(x_BLD.transpose(0, 1).contiguous(), cut.layout.cp)
    return x_SBD.index_select(0, cut.layout.order(x_BLD.device)[: cut.true_length]).transpose(0, 1).contiguous()

# SPDX-License-Identifier: Apache-2.0
"""Which positions of a row each context parallel rank holds.

Legend: S positions, L = S / cp positions of a rank, G = cp ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_moefold.mesh import SINGLE, Axis
from lightning_moefold.modules.attention.blockwise import Span


@dataclass(frozen=True)
class ContextLayout:
    """How the positions of a row are spread over cp ranks.

    Args:
        length: Number of positions S; divisible by ``2 * cp`` if there is more than one rank.
        cp: Context parallel axis.
    """

    length: int
    cp: Axis = SINGLE

    def spans(self, rank: int) -> list[Span]:
        """Returns the positions of a rank in the order in which it holds them."""
        size = self.cp.size
        if size == 1:
            return [Span(0, self.length)]
        chunk = self.length // (2 * size)
        return [Span(rank * chunk, chunk), Span((2 * size - 1 - rank) * chunk, chunk)]

    def positions(self, device: torch.device | None = None, rank: int | None = None) -> Tensor:
        """Returns the positions of a rank of the axis, by default this rank, ``[L]``."""
        spans = self.spans(self.cp.index if rank is None else rank)
        return torch.cat([torch.arange(s.start, s.end, device=device) for s in spans])

    def find(self, position: int) -> tuple[int, int]:
        """Returns the rank that holds a position of the row, and its place among the positions of that rank."""
        for rank in range(self.cp.size):
            before = 0
            for span in self.spans(rank):
                if span.start <= position < span.end:
                    return rank, before + position - span.start
                before += span.end - span.start
        raise IndexError(f"a row of {self.length} has no position {position}")

    def held(self, device: torch.device | None = None) -> Tensor:
        """Returns the positions of each rank, ``[G, L]``."""
        return torch.stack([self.positions(device, rank) for rank in range(self.cp.size)])

    @cached_property
    def held_on_host(self) -> Tensor:
        """:meth:`held` in host memory, made once for all layers."""
        return self.held(torch.device("cpu"))

    def order(self, device: torch.device | None = None) -> Tensor:
        """Returns the index of each position of the row in the concatenation of all ranks, ``[S]``."""
        return torch.argsort(self.held(device).flatten())

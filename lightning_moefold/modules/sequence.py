# SPDX-License-Identifier: Apache-2.0
"""SequenceBatch: describes a batch to the layers, besides its hidden states.

Between blocks the hidden states are just tokens. A context parallel rank holds L positions of each row. They are
flattened to N = B * L tokens and padded to a multiple of tp, and each tensor parallel rank holds T of them (sequence
parallelism). Only attention needs to know where a row ends, so nothing is communicated between attention and MoE.

Legend: B rows, S positions per row, L = S / cp (rows padded as :mod:`.context` says), N = B * L, P = N padded to a
multiple of tp, T = P / tp, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_moefold import comm
from lightning_moefold.mesh import SINGLE, Axis
from lightning_moefold.modules.attention.blockwise import Visibility
from lightning_moefold.modules.attention.exchanges import Exchange
from lightning_moefold.modules.attention.kv_cache import KeyValueCache
from lightning_moefold.modules.attention.layout import ContextLayout
from lightning_moefold.modules.dropped import also_dropped
from lightning_moefold.modules.lora import Places
from lightning_moefold.modules.offload import OffloadedLayer


class SequenceBatch:
    """Shape, positions and masks of a batch on this rank.

    It is not a dataclass, because FSDP2 copies dataclasses that pass through a wrapped module, and statistics put into
    a copy would be lost.

    Args:
        rows: Number of rows, B.
        length: Padded length S of a row; this rank holds L positions of each row.
        tp: Tensor parallel axis over which the tokens are spread.
        cp: Context parallel axis over which rows are cut.

    Attributes:
        cos_BLh: Cosines of the rotary embedding, and ``sin_BLh`` its sines; None if positions are not used.
        layout: Layout of the row's positions over cp.
        document_BS: Number of each position's document; None if each row is one document.
        real_BS: False for padding that queries must not see.
        exchange: Name of the context parallel exchange.
        routed_T: False for tokens that go to no expert; None if all tokens are routed.
        num_routed: Number of True entries in ``routed_T``, so that no layer has to wait for the device.
        counted_T: False for tokens that routing statistics leave out; None if all count.
        num_microbatches: Number of micro-batches, M.
        group_T: Number of each token's group for the load-balancing loss (:mod:`.routers.statistics`); None if there is
            one group.
        num_groups: Number of these groups.
        wants_routing: Whether MoE layers return routing statistics.
        wants_z_loss: Whether the statistics include those of the z-loss.
        row_numbers: Number of each row among those of all data ranks: row b of rank r of R is ``b * R + r``, as rows
            are dealt.
        call: Number of the training call, for routers with noise.
        adapter_call: Number of the training call, from which the dropout of adapters is made; None without.
        offloaded: What the latest layer has sent to host memory; None if activations stay.
        cache: Keys and values of earlier positions during generation; None otherwise.
    """

    def __init__(self, rows: int, length: int, *, tp: Axis = SINGLE, cp: Axis = SINGLE) -> None:
        self.rows, self.tp, self.layout = rows, tp, ContextLayout(length, cp)
        self.length = length // cp.size
        self.cos_BLh: Tensor | None = None
        self.sin_BLh: Tensor | None = None
        self.document_BS: Tensor | None = None
        self.real_BS: Tensor | None = None
        self.exchange: Exchange = "auto"
        self.routed_T: Tensor | None = None
        self.num_routed: int | None = None
        self.counted_T: Tensor | None = None
        self.num_microbatches = 1
        self.group_T: Tensor | None = None
        self.num_groups = 1
        self.wants_routing = self.wants_z_loss = False
        self.row_numbers = range(rows)
        self.call: Tensor | None = None
        self.adapter_call: Tensor | None = None
        self.offloaded: OffloadedLayer | None = None
        self.cache: KeyValueCache | None = None
        self._visibility: dict[int | None, Visibility] = {}
        self._places: tuple[Tensor, Tensor] | None = None
        self._token_places: tuple[Tensor, Tensor] | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens N, without the padding over tp."""
        return self.rows * self.length

    @property
    def padding(self) -> int:
        """Number of padded tokens over tp, P - N."""
        return -self.tokens % self.tp.size

    def pad(self, x_ND: Tensor, value: float = 0) -> Tensor:
        """Pads tokens to a multiple of tp, ``[N, ...] -> [P, ...]``."""
        if self.padding == 0:
            return x_ND
        return F.pad(x_ND, [0, 0] * (x_ND.dim() - 1) + [0, self.padding], value=value)

    def shard(self, x_ND: Tensor, value: float = 0) -> Tensor:
        """Takes this rank's tokens, ``[N, ...] -> [T, ...]``, from a tensor that every tp rank holds."""
        if self.tp.size == 1:
            return x_ND
        x_PD = self.pad(x_ND, value)
        part = x_PD.shape[0] // self.tp.size
        return x_PD.narrow(0, self.tp.index * part, part)

    def gather(self, x_TD: Tensor) -> Tensor:
        """Gathers all tokens of the tp group, ``[T, D] -> [N, D]``; backward sums the gradients of the ranks."""
        return also_dropped(self._cut(comm.all_gather(x_TD, self.tp)), x_TD, self.gather)

    def enter(self, x_ND: Tensor) -> Tensor:
        """Takes this rank's tokens of those that every tp rank has, ``[N, D] -> [T, D]``; backward gathers the gradients."""
        return comm.split_identical(self.pad(x_ND), self.tp)

    def leave(self, x_TD: Tensor) -> Tensor:
        """Inverts :meth:`enter`, ``[T, D] -> [N, D]``; all tp ranks must then compute the same."""
        return self._cut(comm.gather_identical(x_TD, self.tp))

    def _cut(self, x_PD: Tensor) -> Tensor:
        """Removes padding, ``[P, D] -> [N, D]``. No slice is made without padding, because its backward would be a copy."""
        return x_PD if x_PD.shape[0] == self.tokens else x_PD[: self.tokens]

    def reduce_scatter(self, x_ND: Tensor) -> Tensor:
        """Sums partial results over tp and keeps this rank's tokens, ``[N, D] -> [T, D]``."""
        return comm.reduce_scatter(self.pad(x_ND), self.tp)

    def token_places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns the row number and the position in the row of each of this rank's tokens, each ``[T]`` int64."""
        if self._token_places is None:
            row_N, position_N = self._all_token_places(device)
            self._token_places = self.shard(row_N), self.shard(position_N)
        return self._token_places

    def _all_token_places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        numbers = self.row_numbers
        row_B = numbers.start + numbers.step * torch.arange(len(numbers), device=device)
        return row_B.repeat_interleave(self.length), self.layout.positions(device).repeat(self.rows)

    def own_tokens(self, device: torch.device) -> Places:
        """Returns the places of this rank's tokens, ``[T]``, for dropout."""
        return lambda: (self._adapter_call(device), *self.token_places(device))

    def all_tokens(self, device: torch.device) -> Places:
        """Returns the places of all tokens of the tp group, ``[N]``, for dropout."""
        return lambda: (self._adapter_call(device), *self._all_token_places(device))

    def _adapter_call(self, device: torch.device) -> Tensor:
        return torch.zeros((), dtype=torch.int64, device=device) if self.adapter_call is None else self.adapter_call

    def places(self, device: torch.device) -> tuple[Tensor, Tensor, int]:
        """Returns row and position of every token of the cp x tp group, in the order of a gather over tp and then over cp.

        Returns:
            Rows ``[cp * P]`` and positions ``[cp * P]`` (int64; arbitrary for padding), and the number of rows.
        """
        if self._places is None:
            number_P = torch.arange(self.tokens + self.padding, device=device)
            row_P = (number_P // self.length).clamp(max=self.rows - 1)
            held = [self.layout.positions(device, rank)[number_P % self.length] for rank in range(self.layout.cp.size)]
            self._places = row_P.repeat(self.layout.cp.size), torch.cat(held)
        return *self._places, self.rows

    def visibility(self, window: int | None) -> Visibility:
        """Returns which keys of their row the queries see.

        Args:
            window: A query sees at most this many keys, itself included; None for all.
        """
        window = window if window is not None and window < self.layout.length else None
        if window not in self._visibility:
            self._visibility[window] = Visibility(window, self.document_BS, self.real_BS)
        return self._visibility[window]

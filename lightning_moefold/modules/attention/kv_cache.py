# SPDX-License-Identifier: Apache-2.0
"""The key/value cache: keys and values of earlier positions, kept during generation.

Each layer has as many slots as its queries can see keys. A layer with a sliding window overwrites the oldest key by the
newest. The order of keys does not matter to softmax, and keys already contain their rotary positions.

Legend: B rows, S positions of the prompt, L maximum number of positions, K slots in use, V local key/value heads, d
    head size.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_moefold.modules.attention.blockwise import Seen


class _Slots:
    def __init__(self, like_BSVd: Tensor, count: int) -> None:
        rows, _, *head = like_BSVd.shape
        self.key, self.value = (like_BSVd.new_empty(rows, count, *head) for _ in range(2))
        self.seen = 0

    @property
    def count(self) -> int:
        return self.key.shape[1]

    def write(self, k_BSVd: Tensor, v_BSVd: Tensor) -> None:
        """Writes position p to slot ``p % count``; if there are more positions than slots, the last ones are kept."""
        length = k_BSVd.shape[1]
        kept = min(length, self.count)
        slot = torch.arange(self.seen + length - kept, self.seen + length, device=k_BSVd.device) % self.count
        self.key[:, slot], self.value[:, slot] = k_BSVd[:, length - kept :], v_BSVd[:, length - kept :]
        self.seen += length

    def positions(self) -> Tensor:
        """Returns the position in each used slot, ``[K]``."""
        last = self.seen - 1
        slot_K = torch.arange(min(self.seen, self.count), device=self.key.device)
        return last - (last - slot_K) % self.count


class KeyValueCache:
    """Keys and values of a batch for the local heads of a tensor parallel rank.

    Args:
        real_BS: False for padding of the prompts.
        max_length: Maximum number of positions in total, L.
    """

    def __init__(self, real_BS: Tensor, max_length: int) -> None:
        self._padded = not bool(real_BS.all())
        self._real_BL = F.pad(real_BS.bool(), [0, max_length - real_BS.shape[1]], value=True)
        self._layers: dict[Hashable, _Slots] = {}

    def extend(
        self, layer: Hashable, window: int | None, k_BSVd: Tensor, v_BSVd: Tensor
    ) -> tuple[Tensor, Tensor, Seen | Tensor | None]:
        """Adds the keys and values of new positions.

        Args:
            layer: Identifies the layer.
            window: A query sees at most this many keys, itself included; None for all.
            k_BSVd: Keys: of the whole prompt in the first call, then of one position per call.
            v_BSVd: Values of the same positions.

        Returns:
            The keys and values that the new positions attend to, and which of them each row sees: all, or a mask ``[B, 1, 1, K]``
            where prompts are padded. None for the prompt, which is masked as in training.
        """
        if layer not in self._layers:
            longest = self._real_BL.shape[1]
            self._layers[layer] = _Slots(k_BSVd, longest if window is None else min(window, longest))
            self._layers[layer].write(k_BSVd, v_BSVd)
            return k_BSVd, v_BSVd, None
        slots = self._layers[layer]
        slots.write(k_BSVd, v_BSVd)
        used = min(slots.seen, slots.count)
        # Flash kernels take no mask.
        seen = self._real_BL[:, None, None, slots.positions()] if self._padded else Seen.ALL
        return slots.key[:, :used], slots.value[:, :used], seen

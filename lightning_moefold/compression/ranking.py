# SPDX-License-Identifier: Apache-2.0
"""Which channels of which experts a ratio keeps. Pure: arrays in, arrays out.

Channels are compared within a layer, over all its experts together, with those of the shared expert in the same list after
them. Of equal energies the channel of the lower expert goes first, then the lower channel.

Legend: E experts, F expert width, S width of the shared expert, C width that is kept.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_moefold.errors import InputError


class Kept(NamedTuple):
    """The channels of a layer that stay.

    Args:
        routed_EF: Of routed experts, bool.
        shared_S: Of the shared expert, bool; empty without one.
    """

    routed_EF: NDArray[np.bool_]
    shared_S: NDArray[np.bool_]

    @property
    def widths_E(self) -> NDArray[np.int64]:
        """Channels that each routed expert keeps."""
        return self.routed_EF.sum(1)

    @property
    def share(self) -> float:
        """Share of the layer's channels that stay."""
        return float((self.routed_EF.sum() + self.shared_S.sum()) / (self.routed_EF.size + self.shared_S.size))


def check_ratio(ratio: float, name: str = "--ratio") -> float:
    """Returns a share that is pruned or kept, if it lies strictly between 0 and 1.

    Raises:
        InputError: If it does not.
    """
    if not (math.isfinite(ratio) and 0 < ratio < 1):
        raise InputError(f"{name} {ratio} must lie between 0 and 1, both excluded, such as 0.2.")
    return ratio


def keep_by_layer(energy_EF: NDArray[np.float64], shared_S: NDArray[np.float64], ratio: float) -> Kept:
    """Prunes the channels with the least energy of a layer, ``round(ratio * (E * F + S))`` of them, wherever they are."""
    every = np.concatenate([energy_EF.ravel(), shared_S])
    kept = np.ones(len(every), np.bool_)
    kept[np.argsort(every, kind="stable")[: round(ratio * len(every))]] = False
    return Kept(kept[: energy_EF.size].reshape(energy_EF.shape), kept[energy_EF.size :])


def keep_by_expert(
    energy_EF: NDArray[np.float64], shared_S: NDArray[np.float64], width: int, shared_width: int
) -> Kept:
    """Keeps the ``width`` channels with the most energy of every routed expert, and ``shared_width`` of the shared one."""
    return Kept(_top(energy_EF, width), _top(shared_S[None], shared_width)[0])


def _top(energy_EF: NDArray[np.float64], count: int) -> NDArray[np.bool_]:
    kept = np.ones(energy_EF.shape, np.bool_)
    lowest = np.argsort(energy_EF, axis=1, kind="stable")[:, : energy_EF.shape[1] - count]
    np.put_along_axis(kept, lowest, False, axis=1)
    return kept


def uniform_width(width: int, ratio: float, multiple: int, name: str = "expert width") -> int:
    """Returns the multiple of ``multiple`` that is nearest to ``(1 - ratio) * width``, at least one of it.

    Raises:
        InputError: If nothing would be pruned.
    """
    if multiple < 1:
        raise InputError(f"--multiple {multiple} must be at least 1.")
    count = max(multiple, round((1 - ratio) * width / multiple) * multiple)
    if count >= width:
        smaller = (width - 1) // multiple * multiple
        hint = f"a ratio near {1 - smaller / width:.3g}, or " if smaller else ""
        raise InputError(
            f"a ratio of {ratio} leaves the {name} {width} as it is in multiples of {multiple}; use {hint}a smaller --multiple."
        )
    return count

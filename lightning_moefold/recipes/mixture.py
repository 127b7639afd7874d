# SPDX-License-Identifier: Apache-2.0
"""Several sources in one order of rows, each read as often as its weight says."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_moefold.errors import InputError


class Mixture:
    """Rows of an epoch: of a source with n rows and the weight w, w times n.

    The whole part of w says how often each row is read; its fraction says which share of the rows is read once more, drawn
    anew in each epoch.

    Args:
        sizes: Rows of each source; the rows are numbered through.
        weights: Of each source.

    Raises:
        InputError: If weights do not fit their sources, or a source that has one is never read.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float]) -> None:
        check_weights(weights, len(sizes))
        for size, weight in zip(sizes, weights, strict=True):
            if size and weight and not round(size * weight):
                raise InputError(
                    f"a weight of {weight} takes none of the {size} rows of its file in any epoch; use at least {1 / size:.2g}, or "
                    "0 to leave the file out."
                )
        self._sizes, self.weights = sizes, weights
        self.count = sum(round(size * weight) for size, weight in zip(sizes, weights, strict=True))

    def draw(self, generator: torch.Generator | None) -> Tensor:
        """Row numbers of an epoch.

        Args:
            generator: Of the draws; None for the rows in order, and the first ones where a part is read.
        """
        parts, first = [], 0
        for size, weight in zip(self._sizes, self.weights, strict=True):
            whole, rest = divmod(round(size * weight), size) if size else (0, 0)
            order = torch.arange(size) if generator is None else torch.randperm(size, generator=generator)
            parts.append(torch.cat([torch.arange(size).repeat(whole), order[:rest]]) + first)
            first += size
        rows = torch.cat(parts)
        return rows if generator is None else rows[torch.randperm(len(rows), generator=generator)]


def check_weights(weights: Sequence[float], sources: int) -> None:
    """Refuses weights that do not fit their sources.

    Raises:
        InputError: If they are another number, negative, or all zero.
    """
    if len(weights) != sources:
        raise InputError(f"weights has {len(weights)} numbers, but there are {sources} files; give one for each.")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
        raise InputError(f"weights={list(weights)} must be numbers of at least 0, one of them above it.")

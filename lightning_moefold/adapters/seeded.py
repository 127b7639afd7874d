# SPDX-License-Identifier: Apache-2.0
"""Initial values of a new adapter: A is drawn by seed and name, B is zero, so that the model starts equal to its base."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_moefold.kernels.noise import generator_of
from lightning_moefold.layout import Box


class SeededAdapter:
    """Source of the pieces of A and B.

    A is uniform within ``1 / sqrt(in)`` as in PEFT. It is drawn whole for each module or expert from the seed and the
    name, so it does not depend on the fold.

    Args:
        seed: Seed of A.
        shapes: Global shape of each parameter, by name.
    """

    def __init__(self, seed: int, shapes: dict[str, tuple[int, ...]]) -> None:
        self.seed, self.shapes = seed, shapes

    def fill(self, name: str, box: Box, out: Tensor) -> None:
        """Copies the part ``box`` of parameter ``name`` into ``out``."""
        shape, slices = self.shapes[name], box.slices()
        if name.endswith("lora_B") or box.numel == 0:
            out.zero_()
        elif len(shape) == 2:
            out.copy_(self._draw(name, shape)[slices])
        else:
            for piece, expert in zip(out, range(shape[0])[slices[0]], strict=True):
                piece.copy_(self._draw(f"{name}.{expert}", shape[1:])[slices[1:]])

    def _draw(self, place: str, shape: tuple[int, ...]) -> Tensor:
        bound, generator = shape[-1] ** -0.5, generator_of(self.seed, place)
        return torch.empty(shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)

    def close(self) -> None:
        """Does nothing: no file is open."""

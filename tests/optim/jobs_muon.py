# SPDX-License-Identifier: Apache-2.0
"""Steps of Muon on matrices that are cut in every way, run by the ranks of the pool or by one process."""

from __future__ import annotations

from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from lightning_moefold.optim import Muon, matrices

#: Shapes, and over which dimension the two axes of the ranks cut them; pieces of some are uneven, or none.
MATRICES: dict[str, tuple[tuple[int, ...], tuple[Placement, Placement]]] = {
    "a.weight": ((7, 10), (Shard(0), Shard(1))),
    "b.weight": ((9, 6), (Shard(0), Shard(0))),
    "c.weight": ((5, 5), (Replicate(), Shard(1))),
    "d.weight": ((1, 3), (Shard(0), Shard(1))),
    "e.experts.up": ((5, 6, 8), (Shard(0), Shard(2))),
    "f.experts.down": ((3, 8, 7), (Shard(1), Shard(2))),
    "g.weight": ((4, 6), (Replicate(), Replicate())),
}


def train(most: int | None, spread: bool = True) -> dict[str, Tensor]:
    """Weights after two steps, whole.

    Args:
        most: Numbers of a chunk; None for as many as by default.
        spread: Whether four ranks share the work.
    """
    mesh = init_device_mesh("cpu", (2, 2)) if spread else None
    generator = torch.Generator().manual_seed(0)

    def draw(name: str) -> Tensor:
        shape, placements = MATRICES[name]
        whole = torch.randn(shape, generator=generator)
        return whole if mesh is None else distribute_tensor(whole, mesh, placements)

    weights = {name: nn.Parameter(draw(name)) for name in MATRICES}
    optimizer = Muon(weights.items())
    with mock.patch.object(matrices, "MOST_NUMBERS", most or matrices.MOST_NUMBERS):
        for _ in range(2):
            for name, weight in weights.items():
                weight.grad = draw(name)
            optimizer.step()
    return {n: (w.full_tensor() if isinstance(w, DTensor) else w).detach() for n, w in weights.items()}

# SPDX-License-Identifier: Apache-2.0
"""What ranks do in test_gradient_sum.py."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_moefold.fold import Fold
from lightning_moefold.mesh import FoldedMesh
from lightning_moefold.parallel import GradientSum


def two_networks_in_turn(ranks: int) -> list[Tensor | None]:
    """Gradients of two networks that are trained in turn, each accumulating two batches, the other one frozen.

    The gradient of a batch is ``10 * batch + rank + 1`` for the first network, and 100 times that for the second.
    """
    mesh = FoldedMesh(Fold(ranks), "cpu")
    networks = [nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))]
    gradients = GradientSum([(p, mesh.dp_cp) for p in networks])
    for batch in range(2):
        gradients.deferred = batch == 0
        for turn, factor in enumerate((1.0, 100.0)):
            for index, network in enumerate(networks):
                network.requires_grad_(index == turn)
            with gradients.around_backward():
                (networks[turn] * factor * (10 * batch + mesh.rank + 1)).backward()
    return [network.grad for network in networks]

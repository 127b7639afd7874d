# SPDX-License-Identifier: Apache-2.0
"""What runs again in backward knows that it does, however often backward runs."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_moefold.modules.recompute import is_recomputing, recomputed


def test_a_graph_that_is_kept_runs_again_in_every_backward() -> None:
    seen = []

    def cube(x: Tensor) -> Tensor:
        seen.append(is_recomputing())
        return x * x * x

    x = torch.tensor([2.0, 3.0], dtype=torch.float64, requires_grad=True)
    y = recomputed(cube, x).sum()
    for _ in range(2):
        assert torch.equal(torch.autograd.grad(y, x, retain_graph=True)[0], 3 * x.detach() ** 2)
        assert not is_recomputing()
    assert seen == [False, True, True]

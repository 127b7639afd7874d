# SPDX-License-Identifier: Apache-2.0
"""Which experts can move to other ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_moefold.errors import UnsupportedFeature
from lightning_moefold.modules import Experts, MoELayer
from lightning_moefold.parallel.migration import check_movable


class Functional(nn.Module):
    """Drops without a module that says so."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x @ self.weight, 0.1, self.training)


class Asking(Functional):
    """Needs values, which a try without storage does not have."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight if x.sum().item() > 0 else x


def test_experts_that_can_move() -> None:
    check_movable("layer", MoELayer(8, 4, 2, 8))
    check_movable("layer", MoELayer(8, 4, 2, expert=lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.0))))
    check_movable("layer", MoELayer(8, 4, 2, expert=Asking))


@pytest.mark.parametrize(
    "expert",
    [Functional, lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1)), lambda: nn.Sequential(Asking(), nn.RReLU())],
)
def test_experts_that_draw_random_numbers_stay(expert: type[nn.Module]) -> None:
    layer = MoELayer(8, 4, 2, expert=expert).eval()
    with pytest.raises(UnsupportedFeature, match="experts of blocks.3 cannot move .* draws random numbers"):
        check_movable("blocks.3", layer)
    assert not any(part.training for part in layer.modules())


def test_experts_with_something_of_their_own_stay() -> None:
    layer = MoELayer(8, 4, 2, 8)
    layer.experts.register_buffer("scale", torch.ones(3))
    with pytest.raises(UnsupportedFeature, match="the buffer 'scale' belongs to no expert in particular"):
        check_movable("layer", layer)
    other = MoELayer(8, 4, 2, 8)
    assert isinstance(other.experts, Experts)
    other.experts.kernel = "transformer_engine"
    with pytest.raises(UnsupportedFeature, match="keeps FP8 scales for each place"):
        check_movable("layer", other)

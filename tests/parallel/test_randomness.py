# SPDX-License-Identifier: Apache-2.0
"""A second pass draws what the first one drew, from whichever generator, and leaves all of them where they were."""

from __future__ import annotations

import random
from unittest import mock

import numpy as np
import pytest
import torch

from lightning_moefold.parallel.randomness import Randomness


class _Device:
    """The generator of a GPU that is not there."""

    def __init__(self) -> None:
        self.generator = torch.Generator()

    def get_rng_state(self, device: torch.device) -> torch.Tensor:
        return self.generator.get_state()

    def set_rng_state(self, state: torch.Tensor, device: torch.device) -> None:
        self.generator.set_state(state)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_all_generators_draw_again(kind: str) -> None:
    device = _Device()

    def draw() -> list[float]:
        there = float(torch.rand((), generator=device.generator)) if kind == "cuda" else 0.0
        return [float(torch.rand(())), random.random(), float(np.random.rand()), there]

    with mock.patch.multiple(torch.cuda, get_rng_state=device.get_rng_state, set_rng_state=device.set_rng_state):
        start = Randomness(torch.device(kind))
        first, second = draw(), draw()
        with start.again():
            assert draw() == first
        third = draw()
        start.restore(start.device)
        assert [draw(), draw(), draw()] == [first, second, third]

# SPDX-License-Identifier: Apache-2.0
"""Which gradients are summed, and when, as several networks accumulate in turn."""

from __future__ import annotations

from lightning_moefold.testing import RankPool
from tests.parallel import jobs_gradients


def test_two_networks_in_turn(pool: RankPool) -> None:
    """A backward of one network leaves no share of the other's behind that would count as a sum later."""
    for first, second in pool.run(jobs_gradients.two_networks_in_turn, 2, ranks=2):
        assert float(first) == 1 + 2 + 11 + 12
        assert float(second) == 100 * (1 + 2 + 11 + 12)

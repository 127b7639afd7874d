# SPDX-License-Identifier: Apache-2.0
"""What moving to a placement is worth, judged by past loads and without copies. Pure NumPy.

A placement is better if its busiest part has fewer rows, over the past intervals together and in the latest alone. Its moves pay
if that is more than the margin, and if the time gained within the horizon is more than moving takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_moefold.balance.assignment import Counts
from lightning_moefold.balance.costs import BalanceCosts
from lightning_moefold.balance.placement import Placement, check_successor


@dataclass(frozen=True)
class Worth:
    """What a placement is worth in place of another.

    Args:
        gain_ps: Picoseconds that a step gains.
        cost_ps: Picoseconds of the moves.
        better: Whether the busiest part has less to do.
        pays: Whether it is better, by more than the margin and than the moves cost; with a margin of zero, whether it is better.
    """

    gain_ps: int
    cost_ps: int
    better: bool
    pays: bool


def worth_of(placement: Placement, load_NE: Counts, current: Placement, costs: BalanceCosts) -> Worth:
    """Returns what ``placement`` is worth in place of ``current``.

    Args:
        placement: The new one.
        load_NE: Rows of each expert in past intervals, the latest last.
        current: The placement now.
        costs: Constants, horizon and margin among them.

    Raises:
        InputError: If the new one cannot follow the present one.
    """
    check_successor(current, placement)
    now, then = (
        [int(p.part_load(load_E).max()) for load_E in (load_NE.sum(0), load_NE[-1])] for p in (current, placement)
    )
    gain = (now[0] - then[0]) * costs.row_ps * costs.passes // len(load_NE)
    cost = costs.move_ps(current.part_of_expert, placement.part_of_expert, current.parts)
    better = then[0] < now[0] and then[1] < now[1]
    clear = (now[0] - then[0]) * 1_000_000 > costs.margin_ppm * now[0] and gain * costs.horizon > cost
    return Worth(gain, cost, better, better and (clear or not costs.margin_ppm))


def best_that_pays(
    proposed: Placement, offered: Sequence[Placement], load_NE: Counts, current: Placement, costs: BalanceCosts
) -> Placement:
    """Returns the placement that gains most, moves paid, among those whose moves pay; ``proposed`` if none of them does.

    Args:
        proposed: By a policy.
        offered: Others, by a pool (:mod:`.pool`).
        load_NE: Rows of each expert in past intervals, the latest last.
        current: The placement now.
        costs: Constants.
    """
    if not offered:
        return proposed
    pairs = [(p, worth_of(p, load_NE, current, costs)) for p in (proposed, *(p.renumbered(current) for p in offered))]
    paying = [(placement, worth) for placement, worth in pairs if worth.pays]
    if not paying:
        return proposed
    return max(paying, key=lambda pair: pair[1].gain_ps * max(1, costs.horizon) - pair[1].cost_ps)[0]

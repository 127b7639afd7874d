# SPDX-License-Identifier: Apache-2.0
"""The load that is expected next, from past intervals. Pure numpy, in whole numbers.

Prices are those of a pass, so loads are brought to the rows of one first (:func:`of_a_pass`).

Early in training routing changes by the interval, and only the latest says anything; later, the mean of several is nearer to
the next than any of them. So the number of intervals is the one that would have met the latest interval best.
"""

from __future__ import annotations

import numpy as np

from lightning_moefold.balance.assignment import Counts
from lightning_moefold.balance.costs import BalanceCosts

#: Numbers of intervals that are tried.
WINDOWS = (1, 2, 4)


def window(load_NE: Counts) -> int:
    """How many of the latest intervals to add up, of :data:`WINDOWS`."""
    best, missed = WINDOWS[0], -1
    latest_E = load_NE[-1]
    for size in WINDOWS:
        before_E = load_NE[-1 - size : -1].sum(0)
        if len(load_NE) <= size or not before_E.sum():
            break
        # Distance of the two distributions, over the common denominator of all windows.
        wrong = int(np.abs(latest_E * before_E.sum() - before_E * latest_E.sum()).sum() // before_E.sum())
        if missed < 0 or wrong < missed:
            best, missed = size, wrong
    return best


def predicted(load_NE: Counts) -> Counts:
    """Load of each expert that is to be planned for: the mean of several intervals, rounded down."""
    size = window(load_NE)
    return load_NE[-size:].sum(0) // size


def of_a_pass(load_NE: Counts, costs: BalanceCosts) -> Counts:
    """Loads of intervals of any length as rows of a pass, if the constants say how many rows that has; else as they are."""
    if not costs.pass_rows:
        return load_NE
    return load_NE * costs.pass_rows // np.maximum(load_NE.sum(1, keepdims=True), 1)

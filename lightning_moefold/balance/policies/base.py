# SPDX-License-Identifier: Apache-2.0
"""What a policy of expert balance decides.

Two loops ask it. The *slow* one, between steps, knows the loads of past intervals: it may give experts new homes
(:meth:`Policy.place`) and, where the policy copies by history, say which share of an expert's rows each rank is to compute
(:meth:`Policy.replicas`). The *fast* one, in each pass, knows the exact rows of the pass (:meth:`Policy.plan`).

Every rank asks for itself and must hear the same, so all of it is arithmetic on the same whole numbers in a fixed order, without
chance. Past loads are rows of an interval of any length; see ``pass_rows`` of :class:`.BalanceCosts`.

Legend: S source ranks, R ranks of ep, E experts, N past intervals, the latest last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from lightning_moefold.balance.assignment import Counts, at_home, shared_out
from lightning_moefold.balance.costs import BalanceCosts
from lightning_moefold.balance.placement import Placement
from lightning_moefold.balance.worth import best_that_pays


class CopiesFrom(Enum):
    """What a policy's copies are planned from."""

    NOTHING = "nothing"
    """It makes none."""
    PAST = "past loads"
    """Loads of earlier steps, by the slow loop."""
    PASS = "exact counts"
    """The rows of the pass itself, by the fast loop."""


@dataclass(frozen=True)
class Policy:
    """A way to decide; this one leaves everything as it is.

    Args:
        max_copies_per_rank: Experts that a rank may hold besides its own, for what is decided from past loads.

    Attributes:
        name: In the registry.
        moves: Whether it gives experts new homes.
    """

    max_copies_per_rank: int = 1
    name: ClassVar[str]
    moves: ClassVar[bool] = False
    _copies: ClassVar[CopiesFrom] = CopiesFrom.NOTHING

    @property
    def copies(self) -> CopiesFrom:
        """What its copies are planned from."""
        return self._copies

    def place(self, load_NE: Counts, current: Placement, costs: BalanceCosts) -> Placement:
        """Homes for the next interval; ``current`` itself where nothing is to move."""
        return current

    def choose(
        self, load_NE: Counts, current: Placement, costs: BalanceCosts, offered: Sequence[Placement] = ()
    ) -> Placement:
        """:meth:`place`, or a placement that a pool offers (:mod:`..pool`), if its moves pay and gain more."""
        return best_that_pays(self.place(load_NE, current, costs), offered, load_NE, current, costs)

    def replicas(self, load_NE: Counts, held_RE: Counts, owner_E: Counts, costs: BalanceCosts) -> Counts:
        """Rows that each rank is to compute of the loads' sum, ``[R, E]``: where copies are.

        Args:
            load_NE: Past loads.
            held_RE: What this returned before; zeros at first.
            owner_E: Homes.
            costs: Constants.
        """
        return at_home(load_NE.sum(0), owner_E, len(held_RE))

    def divide(self, rows_E: Counts, share_RE: Counts, owner_E: Counts) -> Counts:
        """Rows of a pass on the ranks that hold their expert, where copies come from past loads, ``[R, E]``.

        Args:
            rows_E: Rows of the pass.
            share_RE: What :meth:`replicas` returned.
            owner_E: Homes.
        """
        return shared_out(rows_E, share_RE, owner_E)

    def plan(self, counts_SE: Counts, owner_E: Counts, costs: BalanceCosts, max_copies_per_rank: int) -> Counts:
        """Rows of each expert that each rank computes in this pass, ``[R, E]``; as many ranks as sources.

        Args:
            counts_SE: Rows that each source rank has for each expert.
            owner_E: Homes.
            costs: Constants.
            max_copies_per_rank: Experts that a rank may compute besides its own.
        """
        return at_home(counts_SE.sum(0), owner_E, len(counts_SE))


@dataclass(frozen=True)
class Contiguous(Policy):
    """Experts in blocks of consecutive numbers, for ever: plain expert parallelism, against which the others are measured."""

    name: ClassVar[str] = "contiguous"


def even_split(rows_E: Counts, held_RE: NDArray[Any]) -> Counts:
    """Every expert's rows in equal parts on the ranks that hold it, lower ranks first where they do not divide."""
    held_RE = held_RE.astype(np.int64)
    each_E, more_E = np.divmod(rows_E, np.maximum(held_RE.sum(0), 1))
    return held_RE * (each_E + (np.cumsum(held_RE, 0) <= more_E))

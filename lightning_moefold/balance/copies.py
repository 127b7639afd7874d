# SPDX-License-Identifier: Apache-2.0
"""Copies of experts for one pass of one layer: which rank computes how many rows of which expert. Pure numpy.

A plan says how many rows of each expert each rank computes. Which rows these are follows from the plan and from the
counts that all ranks know, without further communication:

- a rank that computes rows of an expert first takes those of its own tokens, which need not travel;
- the remaining rows, in the order of their sources, are dealt to the ranks in order.

Experts are numbered by the slots in which they live: the E/R experts of rank 0 first.

Legend: R ranks of ep; S sources, a multiple of R, with those of a rank adjacent (its etp peers have their own tokens);
E experts; L = E/R experts owned by each rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lightning_moefold.errors import InputError

Counts = NDArray[np.int64]


def owners(num_experts: int, ranks: int) -> Counts:
    """Returns the rank that owns each expert, its home, ``[E]``."""
    return np.arange(num_experts, dtype=np.int64) // (num_experts // ranks)


def at_home(rows_E: Counts, owner_E: Counts, parts: int) -> Counts:
    """Returns the quota without copies, in which owners compute all rows, ``[R, E]``."""
    quota_RE = np.zeros((parts, len(rows_E)), dtype=np.int64)
    quota_RE[owner_E, np.arange(len(rows_E))] = rows_E
    return quota_RE


def copies_of(quota_RE: Counts, owner_E: Counts) -> NDArray[np.bool_]:
    """Returns which ranks have copies of which experts, ``[R, E]`` bool."""
    held_RE = quota_RE > 0
    held_RE[owner_E, np.arange(quota_RE.shape[1])] = False
    return held_RE


@dataclass(frozen=True, eq=False)
class CopyPlan:
    """A plan of which rank computes how many rows of which expert in one pass.

    Args:
        quota_RE: Rows of each expert that each rank computes, int64; an expert's column sums to all its rows. A rank
            that computes rows of another rank's expert has a copy of it.
    """

    quota_RE: Counts

    @property
    def ranks(self) -> int:
        """Number of ranks, R."""
        return self.quota_RE.shape[0]

    @property
    def local_experts(self) -> int:
        """Number of experts owned by each rank, L."""
        return self.quota_RE.shape[1] // self.ranks

    @cached_property
    def copied_RE(self) -> NDArray[np.bool_]:
        """Which ranks have a copy of which expert, ``[R, E]``."""
        return copies_of(self.quota_RE, owners(self.quota_RE.shape[1], self.ranks))

    @cached_property
    def copies(self) -> int:
        """Number of copies on all ranks."""
        return int(self.copied_RE.sum())

    @property
    def moved_rows(self) -> int:
        """Number of rows that are not computed by the owner of their expert."""
        return int(self.quota_RE[self.copied_RE].sum())

    def borrowed(self, rank: int) -> list[int]:
        """Returns the experts of which ``rank`` has a copy, in the order of its stack of copies."""
        return np.flatnonzero(self.copied_RE[rank]).tolist()

    def lent(self, rank: int) -> list[list[int]]:
        """Returns, for each rank, the experts of ``rank`` of which it has a copy, by their index in the stack of ``rank``."""
        first = rank * self.local_experts
        home_RL = self.copied_RE[:, first : first + self.local_experts]
        return [np.flatnonzero(home_L).tolist() for home_L in home_RL]

    def check(self, counts_SE: Counts, max_copies_per_rank: int, policy: str) -> None:
        """Checks the plan of a policy.

        Args:
            counts_SE: Rows of each expert at each source.
            max_copies_per_rank: Maximum number of copies on a rank.
            policy: Name of the policy, for the message.

        Raises:
            InputError: If a row is computed twice or not at all, or a rank has too many copies. All ranks raise the
                same error.
        """
        if self.quota_RE.shape[1] != counts_SE.shape[1]:
            raise InputError(
                f"the policy of copies {policy!r} plans {self.quota_RE.shape[1]} experts, and there are {counts_SE.shape[1]}; a "
                "plan is a table of ranks by experts."
            )
        rows_E, experts = self.quota_RE.sum(0), counts_SE.sum(0)
        if (self.quota_RE < 0).any() or (rows_E != experts).any():
            expert = int(np.flatnonzero((rows_E != experts) | (self.quota_RE < 0).any(0))[0])
            raise InputError(
                f"the policy of copies {policy!r} plans {self.quota_RE[:, expert].tolist()} rows of expert {expert} for the "
                f"ranks, and there are {int(experts[expert])}; a plan computes every row once."
            )
        most = int(self.copied_RE.sum(1).max())
        if most > max_copies_per_rank:
            raise InputError(
                f"the policy of copies {policy!r} plans {most} copies on one rank, and max_copies_per_rank is "
                f"{max_copies_per_rank}; it must keep to that."
            )


def no_copies(counts_SE: Counts, ranks: int) -> Counts:
    """Returns :func:`at_home` of the rows of all sources."""
    return at_home(counts_SE.sum(0), owners(counts_SE.shape[1], ranks), ranks)


class RowSplit:
    """Computes how many rows of an expert go from which source to which rank; the result is the same on every rank.

    Args:
        counts_SE: Rows of each expert at each source.
        plan: The plan of which rank computes how many of them.
    """

    def __init__(self, counts_SE: Counts, plan: CopyPlan) -> None:
        self._counts_SE, self._plan = counts_SE, plan
        self._peers = len(counts_SE) // plan.ranks
        # Few experts have copies; all rows of other experts go to their owner.
        self._copied_X = np.flatnonzero(plan.copied_RE.any(0))
        rows_SX, quota_RX = counts_SE[:, self._copied_X], plan.quota_RE[:, self._copied_X]
        rows_RPX = rows_SX.reshape(plan.ranks, self._peers, -1)
        own_RPX = np.clip(quota_RX[:, None] - (rows_RPX.cumsum(1) - rows_RPX), 0, rows_RPX)
        self._own_SX = own_RPX.reshape(rows_SX.shape)
        # For each expert, the remaining rows are intervals on one line, by source and by rank; rows go where two
        # intervals overlap.
        left_SX, need_RX = rows_SX - self._own_SX, quota_RX - own_RPX.sum(1)
        self._left_ends_SX, self._need_ends_RX = left_SX.cumsum(0), need_RX.cumsum(0)
        self._left_starts_SX, self._need_starts_RX = self._left_ends_SX - left_SX, self._need_ends_RX - need_RX

    def sent(self, source: int) -> Counts:
        """Returns the number of rows that go from ``source`` to each rank, ``[R, E]``."""
        ends_RX = np.minimum(self._need_ends_RX, self._left_ends_SX[source])
        rows_RX = np.maximum(ends_RX - np.maximum(self._need_starts_RX, self._left_starts_SX[source]), 0)
        rows_RX[source // self._peers] += self._own_SX[source]
        rows_RE = no_copies(self._counts_SE[source : source + 1], self._plan.ranks)
        rows_RE[:, self._copied_X] = rows_RX
        return rows_RE

    def received(self, rank: int) -> Counts:
        """Returns the number of rows that ``rank`` receives from each source, ``[S, E]``."""
        ends_SX = np.minimum(self._left_ends_SX, self._need_ends_RX[rank])
        rows_SX = np.maximum(ends_SX - np.maximum(self._left_starts_SX, self._need_starts_RX[rank]), 0)
        mine = slice(rank * self._peers, (rank + 1) * self._peers)
        rows_SX[mine] += self._own_SX[mine]
        rows_SE = np.zeros_like(self._counts_SE)
        local = self._plan.local_experts
        at_home = slice(rank * local, (rank + 1) * local)
        rows_SE[:, at_home] = self._counts_SE[:, at_home]
        rows_SE[:, self._copied_X] = rows_SX
        return rows_SE

# SPDX-License-Identifier: Apache-2.0
"""An all-to-all in which some experts compute on several ranks: who sends how much in which part. Pure numpy.

Rows for copies travel in a part of their own, the last one. Where nobody has a copy there is none.

Legend: R ranks of ep, P etp peers, S = R*P sources, E experts, L experts at home, X experts of one part on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lightning_moefold.balance.copies import CopyPlan, Counts, RowSplit


@dataclass(frozen=True)
class Part:
    """The exchange of one part.

    Args:
        send: Rows to each ep rank.
        receive: Rows from each ep rank.
        arrived: Rows that each etp peer receives over ep.
        counts_PSX: Rows of each expert of the part, from each ep rank of each peer.
    """

    send: list[int]
    receive: list[int]
    arrived: list[int]
    counts_PSX: Counts

    @property
    def counts(self) -> list[int]:
        """Rows of each expert."""
        return self.counts_PSX.sum((0, 1)).tolist()


@dataclass(frozen=True)
class Travel:
    """How this rank's rows travel.

    Args:
        starts_B: Blocks of rows in the order in which they travel: where each begins among the rows in the order of experts.
        rows_B: Rows of each block.
        parts: In turn.
    """

    starts_B: Counts
    rows_B: Counts
    parts: list[Part]

    @property
    def shift_B(self) -> Counts:
        """How far from its place each block begins among the rows in the order of experts."""
        return self.starts_B - (np.cumsum(self.rows_B, dtype=np.int64) - self.rows_B)

    @property
    def in_order(self) -> bool:
        """Whether rows travel in the order of experts."""
        return bool((self.starts_B[1:] >= self.starts_B[:-1]).all())


def travel_of(counts_SE: Counts, plan: CopyPlan, sizes: list[int], rank: int, peer: int) -> Travel:
    """The exchange of a plan, from one rank's place.

    Args:
        counts_SE: Rows of each expert at each source, ep outer, etp inner.
        plan: Which rank computes how many of them.
        sizes: Experts at home in each part; their sum is L.
        rank: Of ep.
        peer: Of etp.
    """
    ranks, local = plan.ranks, plan.local_experts
    peers, experts = counts_SE.shape[0] // ranks, counts_SE.shape[1]
    split = RowSplit(counts_SE, plan)
    part_L = np.repeat(np.arange(len(sizes)), sizes)
    sent_RE = split.sent(rank * peers + peer)
    expert_B, to_B = np.nonzero(sent_RE.T)  # blocks in the order of experts, then of ranks
    rows_B = sent_RE[to_B, expert_B]
    at_home_B = expert_B // local == to_B
    part_B = np.where(at_home_B, part_L[expert_B % local], len(sizes))
    order_B = np.lexsort((expert_B, to_B, part_B))
    number = len(sizes) + (plan.copies > 0)
    sent_CR = np.bincount(part_B * ranks + to_B, rows_B, number * ranks).astype(np.int64).reshape(number, ranks)

    received_SPE = split.received(rank).reshape(ranks, peers, experts)
    ends = np.cumsum(sizes) + rank * local
    members = [list(range(end - size, end)) for size, end in zip(sizes, ends.tolist(), strict=True)]
    members += [plan.borrowed(rank)] if plan.copies else []
    parts = []
    for experts_X, sent_R in zip(members, sent_CR, strict=True):
        counts_PSX = received_SPE[:, :, experts_X].transpose(1, 0, 2)
        rows_PS = counts_PSX.sum(2)
        parts.append(Part(sent_R.tolist(), rows_PS[peer].tolist(), rows_PS.sum(1).tolist(), counts_PSX))
    return Travel((rows_B.cumsum() - rows_B)[order_B], rows_B[order_B], parts)

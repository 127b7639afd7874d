# SPDX-License-Identifier: Apache-2.0
"""Distributes rows over copies that were chosen before. Pure Python.

The copies were planned from past loads; how many rows each copy takes follows from the exact counts. Copies are edges
between the expert's home and a helper. If the edges form no cycle, as with one copy per rank, one pass over the ranks
balances them: a rank with a single remaining edge must reach the mean of the ranks connected with it over that edge, as
far as the edge's rows allow. Then the edge is settled, and another rank has one edge less. In a cycle, the edge with
the most planned rows is settled first, in proportion to its plan.

Legend: R ranks of ep, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from lightning_moefold.balance.assignment import Counts, at_home, copies_of


@dataclass
class _Edge:
    """A copy, with the rows that it takes once it is settled."""

    expert: int
    owner: int
    helper: int
    planned: int

    def other(self, rank: int) -> int:
        return self.helper if rank == self.owner else self.owner


@dataclass
class _Rows:
    """The rows of ranks while copies are settled."""

    load: list[int]
    left: list[int]
    taken: list[tuple[_Edge, int]] = field(default_factory=list)

    def settle(self, edge: _Edge, rows: int) -> None:
        rows = max(0, min(rows, self.left[edge.expert]))
        self.left[edge.expert] -= rows
        self.load[edge.owner] -= rows
        self.load[edge.helper] += rows
        self.taken.append((edge, rows))


def split_exactly(rows_E: Counts, share_RE: Counts, owner_E: Counts) -> Counts:
    """Distributes each expert's rows over its home and its copies, as evenly as one pass can, ``[R, E]``.

    Args:
        rows_E: Rows of each expert.
        share_RE: The assignment that was planned for other rows; it says where copies are.
        owner_E: Home rank of each expert.
    """
    parts, planned_E = len(share_RE), share_RE.sum(0)
    quota_RE = at_home(rows_E, owner_E, parts)
    helpers, experts = np.nonzero(copies_of(share_RE, owner_E))
    edges = [
        _Edge(e, int(owner_E[e]), h, int(share_RE[h, e] * rows_E[e] // planned_E[e]))
        for h, e in zip(helpers.tolist(), experts.tolist(), strict=True)
    ]
    rows = _Rows(quota_RE.sum(1).tolist(), rows_E.tolist())
    for group in _connected(edges, parts):
        _settle_group(group, rows)
    for edge, taken in rows.taken:
        quota_RE[edge.owner, edge.expert] -= taken
        quota_RE[edge.helper, edge.expert] += taken
    return quota_RE


def _connected(edges: list[_Edge], parts: int) -> list[list[_Edge]]:
    """Groups the edges of ranks that are connected with each other."""
    root = list(range(parts))

    def find(rank: int) -> int:
        while root[rank] != rank:
            rank = root[rank]
        return rank

    for edge in edges:
        root[find(edge.owner)] = find(edge.helper)
    groups: dict[int, list[_Edge]] = {}
    for edge in edges:
        groups.setdefault(find(edge.owner), []).append(edge)
    return list(groups.values())


def _settle_group(edges: list[_Edge], rows: _Rows) -> None:
    ranks = {rank for edge in edges for rank in (edge.owner, edge.helper)}
    mean = -(-sum(rows.load[rank] for rank in ranks) // len(ranks))
    at: dict[int, list[_Edge]] = {rank: [] for rank in sorted(ranks)}
    for edge in edges:
        at[edge.owner].append(edge)
        at[edge.helper].append(edge)
    ends = [rank for rank, open_edges in at.items() if len(open_edges) == 1]
    for _ in range(len(edges)):
        while ends and len(at[ends[-1]]) != 1:
            ends.pop()
        if ends:
            rank = ends.pop()
            edge = at[rank][0]
            lacks = mean - rows.load[rank]
            rows.settle(edge, lacks if rank == edge.helper else -lacks)
        else:
            edge = max((e for open_edges in at.values() for e in open_edges), key=lambda e: e.planned)
            rows.settle(edge, edge.planned)
        for rank in (edge.owner, edge.helper):
            at[rank].remove(edge)
            if len(at[rank]) == 1:
                ends.append(rank)

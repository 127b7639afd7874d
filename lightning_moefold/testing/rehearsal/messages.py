# SPDX-License-Identifier: Apache-2.0
"""A collective as one rank sees it, and what it is for. Pure Python."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class Message:
    """A collective as one rank sees it.

    Args:
        kind: ``all-reduce``, ``all-gather``, ``reduce-scatter``, ``all-to-all``, ``send`` or ``recv``.
        ranks: Of the group; of a message between two ranks, the sender and the receiver.
        bytes: Of the larger of its two buffers on this rank.
    """

    kind: str
    ranks: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Expected:
    """A collective, and what it is for.

    Args:
        purpose: In words.
        axis: Of the fold.
        message: What a rank sees of it.
        count: How often in a step.
    """

    purpose: str
    axis: str
    message: Message
    count: int


def as_counter(expected: list[Expected]) -> Counter[Message]:
    """How often each collective is called."""
    total: Counter[Message] = Counter()
    for entry in expected:
        total[entry.message] += entry.count
    return total

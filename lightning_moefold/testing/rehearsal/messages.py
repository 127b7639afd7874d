# SPDX-License-Identifier: Apache-2.0
"""Records of collectives as one rank sees them, with their purpose. Pure Python."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class Message:
    """A collective as one rank sees it.

    Args:
        kind: ``all-reduce``, ``all-gather``, ``reduce-scatter``, ``all-to-all``, ``send`` or ``recv``.
        ranks: Ranks of the group; for a message between two ranks, the sender and the receiver.
        bytes: Bytes of the larger of its two buffers on this rank.
    """

    kind: str
    ranks: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Expected:
    """A collective with its purpose.

    Args:
        purpose: Purpose in words.
        axis: Axis of the fold.
        message: The collective as one rank sees it.
        count: Number of calls per step.
    """

    purpose: str
    axis: str
    message: Message
    count: int


def as_counter(expected: list[Expected]) -> Counter[Message]:
    """Returns how often each collective is called."""
    total: Counter[Message] = Counter()
    for entry in expected:
        total[entry.message] += entry.count
    return total

# SPDX-License-Identifier: Apache-2.0
"""Computes from sizes the messages of attention over context parallel ranks (cp); part of :mod:`.expected`.

    ring         keys and values go to the next rank cp - 1 times, forward and again in backward, where their gradients
                 follow and make one more step home: cp times, in float32
    all_gather   keys and values of whole rows, forward and again in backward; their gradients, in float32, summed and
                 scattered
    all_to_all   queries, keys, values and outputs once each way; backward as many gradients

The first two exchange key/value heads in groups, as many heads as fit into a message. Recomputation in backward sends
the messages of forward again.

Legend: as in :mod:`.attention.context`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from lightning_moefold.fold import Fold
from lightning_moefold.layout import even_split
from lightning_moefold.models import MoEConfig
from lightning_moefold.modules.attention.exchanges import exchange_for, heads_of_message
from lightning_moefold.modules.recompute_parts import LAYER, recompute_parts
from lightning_moefold.testing.rehearsal.messages import Expected, Message
from lightning_moefold.testing.rehearsal.scale import Step

_HALF, _SINGLE = 2, 4


def attention_messages(
    step: Step, fold: Fold, rank: int, group: tuple[int, ...], rows: int, calls: int
) -> Iterator[Expected]:
    """Yields the messages of a rank's attention over cp in a step.

    Args:
        step: The training step.
        fold: The fold.
        rank: The rank.
        group: The rank's cp group.
        rows: Number of rows per call.
        calls: Number of calls of attention layers, forward and backward.
    """
    cp = len(group)
    if cp == 1:
        return
    heads, kv_heads = _local_heads(step.config, fold.tp, fold.coordinates(rank)["tp"])
    a_head = rows * step.sequence_length // cp * step.config.head_dim  # numbers
    exchange = step.exchange
    if exchange == "auto":
        exchange = exchange_for(cp, heads, kv_heads, 2 * kv_heads * a_head * _HALF * cp)
    forward = 1 + bool({LAYER, "attention"} & recompute_parts(step.recompute))
    if exchange == "all_to_all":
        for purpose, number in (("queries and outputs", heads), ("keys and values", kv_heads)):
            message = Message("all-to-all", group, number * a_head * _HALF)
            yield Expected(purpose, "cp", message, 2 * (forward + 1) * calls)
        return
    index = group.index(rank)
    after, before = group[(index + 1) % cp], group[index - 1]
    for some, times in _groups(kv_heads, 2 * a_head * _HALF).items():
        pair, gradients, often = 2 * some * a_head * _HALF, 2 * some * a_head * _SINGLE, times * calls
        if exchange == "all_gather":
            gathered, scattered = (
                Message("all-gather", group, cp * pair),
                Message("reduce-scatter", group, cp * gradients),
            )
            yield Expected("keys and values", "cp", gathered, (forward + 1) * often)
            yield Expected("their gradients", "cp", scattered, often)
            continue
        travels = (("keys and values", pair, (forward + 1) * (cp - 1)), ("their gradients", gradients, cp))
        for purpose, size, rounds in travels:
            yield Expected(purpose, "cp", Message("send", (rank, after), size), rounds * often)
            yield Expected(purpose, "cp", Message("recv", (before, rank), size), rounds * often)


def _local_heads(config: MoEConfig, tp: int, index: int) -> tuple[int, int]:
    """Returns the numbers of query heads that a tp rank computes, cut evenly, and of the key/value heads that they need.

    A key/value head is repeated for each query head if heads do not serve equally many.
    """
    split, share = even_split(config.num_attention_heads, tp), config.num_attention_heads // config.num_key_value_heads
    first, heads = sum(split[:index]), split[index]
    served = Counter(head // share for head in range(first, first + heads))
    return heads, len(served) if len(set(served.values())) == 1 else heads


def _groups(kv_heads: int, bytes_of_a_head: int) -> Counter[int]:
    """Returns how many groups of heads there are of each size."""
    some = heads_of_message(kv_heads, bytes_of_a_head)
    return Counter(min(some, kv_heads - start) for start in range(0, kv_heads, some))

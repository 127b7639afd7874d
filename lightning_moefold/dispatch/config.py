# SPDX-License-Identifier: Apache-2.0
"""How tokens travel to their experts, as the user chooses it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

DispatcherName = Literal["alltoall", "allgather", "deduplicated", "hierarchical", "auto"]
DropPolicy = Literal["probs", "position"]
DropScope = Literal["full_sequence", "sub_sequence"]

DISPATCHER_NAMES = ("alltoall", "allgather", "deduplicated", "hierarchical", "auto")


@dataclass(frozen=True)
class DispatchConfig:
    """How a MoE layer sends tokens to experts.

    Args:
        dispatcher: ``"alltoall"`` sends a token once for each of its experts, ``"deduplicated"`` once for each *rank* that
            holds some of them, ``"allgather"`` to every rank, ``"hierarchical"`` once to each *node* and from there once to
            each rank; ``"auto"`` chooses (:func:`choose_dispatcher`), never the last.
        capacity_factor: An expert serves ``ceil(capacity_factor * k * L / E)`` tokens of a row of L tokens and drops the
            others; None to drop none.
        drop_policy: Which it serves: those of the highest router probability, ``"probs"`` (half its bits; ties by position), or the
            first of the row, ``"position"``.
        drop_scope: ``"full_sequence"`` counts over the whole row, wherever its parts lie: the same under every fold.
            ``"sub_sequence"`` counts over the tokens of one rank, without communication: *its result depends on the
            fold*, by design.
        pad_to_capacity: Send every expert as many rows as it may serve, the missing ones empty. Nothing then depends on
            the data, and no host waits for a device; needs a ``capacity_factor``.
        chunks: Parts, by expert, in which a layer's tokens travel, so that one part's exchange hides behind another's
            computation; bit for bit the same result. Only for ``"alltoall"``.
        node_size: Ranks that share fast links, consecutive ones, for ``"hierarchical"``; None for one node. Where ep has
            one rank in a node, or lies within one, a token travels as under ``"deduplicated"``.

    Raises:
        ValueError: For a value that is not known, or two that contradict each other.
    """

    dispatcher: DispatcherName = "alltoall"
    capacity_factor: float | None = None
    drop_policy: DropPolicy = "probs"
    drop_scope: DropScope = "full_sequence"
    pad_to_capacity: bool = False
    chunks: int = 1
    node_size: int | None = None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("dispatcher", self.dispatcher, DISPATCHER_NAMES),
            ("drop_policy", self.drop_policy, ("probs", "position")),
            ("drop_scope", self.drop_scope, ("full_sequence", "sub_sequence")),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r} is not available; use {' or '.join(map(repr, known))}.")
        factor = self.capacity_factor
        if factor is not None and not (0 < factor < math.inf):
            raise ValueError(f"capacity_factor={factor} must be a positive number, or None to drop no tokens.")
        if self.pad_to_capacity and factor is None:
            raise ValueError("pad_to_capacity=True needs a capacity_factor, which says how far to pad.")
        if self.chunks < 1:
            raise ValueError(f"dispatch_chunks={self.chunks} must be at least 1.")
        if self.node_size is not None and self.node_size < 1:
            raise ValueError(f"node_size={self.node_size} must be at least 1.")
        if self.dispatcher in ("allgather", "deduplicated", "hierarchical"):
            for name, given in (("pad_to_capacity", self.pad_to_capacity), ("dispatch_chunks", self.chunks > 1)):
                if given:
                    raise ValueError(f"{name} does not go with dispatcher={self.dispatcher!r}; use 'alltoall'.")

    def capacity(self, tokens: int, top_k: int, num_experts: int) -> int:
        """Tokens of a row that an expert serves, ``min(L, ceil(CF * k * L / E))`` (arXiv 2504.14960, equation 4).

        Args:
            tokens: L, padding left out.
            top_k: k.
            num_experts: E.
        """
        if self.capacity_factor is None:
            return tokens
        return min(tokens, math.ceil(self.capacity_factor * top_k * tokens / num_experts))


def choose_dispatcher(config: DispatchConfig, num_experts: int, top_k: int, ep: int) -> DispatcherName:
    """What ``"auto"`` stands for, by the rows of a token that travel on average under balanced routing.

    A token has ``k`` rows in an all-to-all. Its experts live on ``r = ep * (1 - (1 - 1/ep)^k)`` ranks, which is what
    deduplication sends, with an index for each row beside it; an all-gather sends it to all ``ep``. So all-gather where
    r is nearly ep (within a tenth: no permutation, no index), deduplication where r is clearly less than k, and plain
    all-to-all otherwise, and wherever padding or chunks ask for it.

    Args:
        config: As chosen.
        num_experts: E.
        top_k: k.
        ep: Expert parallel ranks.
    """
    if config.dispatcher != "auto":
        return config.dispatcher
    if ep == 1 or config.pad_to_capacity or config.chunks > 1:
        return "alltoall"
    ranks = ep * (1 - (1 - 1 / ep) ** top_k)
    if config.capacity_factor is None and ranks > 0.9 * ep:
        return "allgather"
    return "deduplicated" if ranks < 0.9 * top_k else "alltoall"

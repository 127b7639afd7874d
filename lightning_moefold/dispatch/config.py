# SPDX-License-Identifier: Apache-2.0
"""How tokens travel to their experts, as the user chooses it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from lightning_moefold.arguments import check_choice, check_count, is_number
from lightning_moefold.balance.fast import ExpertCopies
from lightning_moefold.errors import FoldError, InputError, InputTypeError
from lightning_moefold.fold import Fold, expert_nodes

DispatcherName = Literal["alltoall", "allgather", "deduplicated", "hierarchical", "auto"]
DropPolicy = Literal["probs", "position"]
DropScope = Literal["full_sequence", "sub_sequence"]

DISPATCHER_NAMES = ("alltoall", "deduplicated", "hierarchical", "allgather", "auto")
DROP_SCOPES = ("full_sequence", "sub_sequence")
#: Of the rows that would travel between nodes otherwise, the part below which it is worth to travel in two steps.
_WORTH_TWO_STEPS = 0.75


@dataclass(frozen=True)
class DispatchConfig:
    """How a MoE layer sends tokens to experts.

    Args:
        dispatcher: ``"alltoall"`` sends a token once for each of its experts, ``"deduplicated"`` once for each *rank* that
            holds some of them, ``"allgather"`` to every rank, ``"hierarchical"`` once to each *node* and from there once to
            each rank; ``"auto"`` chooses (:func:`choose_dispatcher`).
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
        node_size: Ranks that share fast links, consecutive ones, for ``"hierarchical"`` and ``"auto"``; None for one node.
            Where ep has one rank in a node, or lies within one, a token travels as under ``"deduplicated"``.
        copies: Copies of busy experts on other ranks, made anew in each pass; the same result. None for none. Not with
            padding.

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
    copies: ExpertCopies | None = None

    def __post_init__(self) -> None:
        check_choice("dispatcher", self.dispatcher, DISPATCHER_NAMES)
        check_choice("drop_policy", self.drop_policy, ("probs", "position"))
        check_choice("drop_scope", self.drop_scope, DROP_SCOPES)
        check_choice("pad_to_capacity", self.pad_to_capacity, (False, True))
        factor = self.capacity_factor
        if factor is not None and not (is_number(factor) and factor > 0):
            raise InputError(f"capacity_factor={factor!r} must be a positive number, or None to drop no tokens.")
        if self.pad_to_capacity and factor is None:
            raise InputError("pad_to_capacity=True needs a capacity_factor, which says how far to pad.")
        check_count("dispatch_chunks", self.chunks)
        if self.node_size is not None:
            check_count("node_size", self.node_size)
        if not (self.copies is None or isinstance(self.copies, ExpertCopies)):
            raise InputTypeError(f"expert_copies={self.copies!r} is not available; use ExpertCopies(...), or None.")
        if self.dispatcher in ("allgather", "deduplicated", "hierarchical"):
            for name, given in (
                ("pad_to_capacity", self.pad_to_capacity),
                ("dispatch_chunks", self.chunks > 1),
            ):
                if given:
                    raise InputError(f"{name} does not go with dispatcher={self.dispatcher!r}; use 'alltoall'.")
        if self.pad_to_capacity and self.copies is not None:
            raise InputError(
                "pad_to_capacity gives every rank the same rows, so expert_copies have nothing to even out; leave one of them out."
            )

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


def choose_dispatcher(config: DispatchConfig, num_experts: int, top_k: int, ep: int, nodes: int = 1) -> DispatcherName:
    """What ``"auto"`` stands for, by the rows of a token that travel on average under balanced routing.

    A token has ``k`` rows in an all-to-all. Its experts live on ``r(ep)`` ranks, with ``r(n) = n (1 - C(E - E/n, k) / C(E, k))``,
    which is what deduplication sends, with an index for each row beside it; an all-gather sends it to all ``ep``. So all-gather
    where r(ep) is nearly ep (within a tenth: no permutation, no index; a ring, too, brings a token to each node once),
    deduplication where r(ep) is clearly less than k, and plain all-to-all otherwise, and wherever padding, chunks or copies of
    experts ask for it (with copies, the others wait for the device more often).

    By node where ep has several ranks in each of several nodes, and r(nodes) is at most three quarters of r(ep): exchange by node
    then saves ``(r(ep) - r(nodes)) * (1 - 1/nodes)`` rows of a token between nodes. What it adds is less than ``r(ep)`` rows within
    the node, over links at least eight times as fast (NVLink beside a network port for each GPU: 9 times on a DGX H100, 12 on a
    DGX A100, 18 on a DGX B200). Few tokens, and links on which an all-gather is faster still, are left to the planner.

    Args:
        config: As chosen.
        num_experts: E.
        top_k: k.
        ep: Expert parallel ranks.
        nodes: Over which they lie, several on each; 1 where they do not (:func:`~..fold.expert_nodes`).
    """
    if config.dispatcher != "auto":
        return config.dispatcher
    if ep == 1 or config.pad_to_capacity or config.chunks > 1 or config.copies is not None:
        return "alltoall"
    ranks = _places(ep, num_experts, top_k)
    if config.capacity_factor is None and ranks > 0.9 * ep:
        return "allgather"
    if nodes > 1 and _places(nodes, num_experts, top_k) <= _WORTH_TWO_STEPS * ranks:
        return "hierarchical"
    return "deduplicated" if ranks < 0.9 * top_k else "alltoall"


def _places(places: int, num_experts: int, top_k: int) -> float:
    """Mean number of equal places that hold some of a token's k experts, all sets of which are alike."""
    return places * (1 - math.comb(num_experts - num_experts // places, top_k) / math.comb(num_experts, top_k))


def settle(config: DispatchConfig, num_experts: int, top_k: int, fold: Fold) -> DispatchConfig:
    """The configuration with what ``"auto"`` stands for under a fold: the same on every rank, since only sizes decide.

    Raises:
        FoldError: For copies of experts where one rank holds them all.
    """
    if config.copies is not None and fold.ep == 1:
        raise FoldError(
            f"expert_copies even out the ranks of ep, and fold {fold} has one of them; use a fold with ep > 1, or no expert_copies."
        )
    nodes = expert_nodes(fold.ep, fold.etp, config.node_size) if config.node_size else 1
    return replace(config, dispatcher=choose_dispatcher(config, num_experts, top_k, fold.ep, nodes))

# SPDX-License-Identifier: Apache-2.0
"""What all token dispatchers have in common: six steps, of which two communicate.

The workflow of MoE Parallel Folding (arXiv 2504.14960, section 3) and of Megatron-Core::

    dispatch_preprocess    sort the choices; exchange counts             (one small all-gather of integers)
    token_dispatch         tokens to the ranks of their experts          (communicates)
    dispatch_postprocess   which of the arrived tokens each expert reads, in what order
        ... experts: gather, compute, weight, sum per token ...
    combine_preprocess     one row per arrived token, as it will travel
    token_combine          rows back home                                (communicates)
    combine_postprocess    sum of each token's rows

The weights travel with the tokens and are applied by the experts, in the middle of an expert's computation: so a token
with several experts on one rank can come back as one row, and no expert's output has to be kept for backward.

Legend: T tokens of this rank, K experts per token, R rows sent, A tokens or rows that arrive (after etp), M rows computed
here, in expert order, D hidden size, E experts, L local experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_moefold.async_comm import Handle
from lightning_moefold.balance.copies import CopyPlan
from lightning_moefold.dispatch.config import DispatchConfig
from lightning_moefold.mesh import SINGLE, Axis, FoldedMesh


@dataclass(frozen=True)
class ExpertAxes:
    """The axes over which a layer's experts are spread.

    Args:
        ep: Expert parallel axis.
        etp: Expert tensor parallel axis.
        etp_ep: The joint axis (ep outer, etp inner).
        nodes: The ranks of the same place in each node, where ep spans nodes and is to be taken node by node.
        within: The axes in this node, likewise.
    """

    ep: Axis = SINGLE
    etp: Axis = SINGLE
    etp_ep: Axis = SINGLE
    nodes: Axis | None = None
    within: ExpertAxes | None = None

    @classmethod
    def of(cls, mesh: FoldedMesh, config: DispatchConfig) -> ExpertAxes:
        """The axes of a fold. Where tokens go by node, collective over the world the first time."""
        ep, etp, joint = mesh.ep, mesh.etp, mesh.axis("etp_ep")
        size = config.node_size
        if config.dispatcher != "hierarchical" or size is None:
            return cls(ep, etp, joint)
        cut, joint_cut = mesh.cut_by_node("ep", size), mesh.cut_by_node("etp_ep", size)
        if cut is None or joint_cut is None or joint_cut[0].size != cut[0].size * etp.size:
            return cls(ep, etp, joint)
        return cls(ep, etp, joint, cut[1], cls(cut[0], etp, joint_cut[0]))


@dataclass(frozen=True)
class Choices:
    """The experts of this rank's tokens.

    Args:
        weight_TK: Router weights, in at least float32; differentiable.
        expert_TK: Experts of each token, int64.
        kept_TK: False for choices that nobody serves: of padding, or dropped; ``[T, K]`` or ``[T, 1]``. None if all are served.
        served: How many are served, where the host knows.
        capacity: To pad to it, the rows that an expert may serve of a rank's tokens at most: the same on all ranks that
            share experts. None to send what there is.
    """

    weight_TK: Tensor
    expert_TK: Tensor
    kept_TK: Tensor | None = None
    served: int | None = None
    capacity: int | None = None


@dataclass(frozen=True)
class ExpertRows:
    """What the experts of a rank compute: rows in expert order, each reading one of the tokens that arrived.

    Args:
        token_M: Token that each row reads; None where row m reads token m.
        weight_M: Router weight of each row, in at least float32; differentiable.
        counts_L: Rows of each expert, int64, on the device.
        distinct: Whether every token is read exactly once.
        counts: ``counts_L``, where the host knows it already.
    """

    token_M: Tensor | None
    weight_M: Tensor
    counts_L: Tensor
    distinct: bool
    counts: list[int] | None = None


class Parcel(NamedTuple):
    """Tokens on their way to experts. A tuple, so that FSDP2 sees its tensors.

    Args:
        x: Tokens, ``[R, D]`` before and ``[A, D]`` after the exchange.
        weight: Weights of rows or tokens, perhaps with integers beside them (:mod:`.packing`).
        plan: The dispatcher's own; ``plan.experts`` says which experts have copies in this pass, None where none are planned.
        handle: In which both are under way.
    """

    x: Tensor
    weight: Tensor
    plan: Any
    handle: Handle | None = None


class Return(NamedTuple):
    """Expert outputs on their way home.

    Args:
        y: Rows.
        handle: In which they are under way.
    """

    y: Tensor
    handle: Handle | None = None


class TokenDispatcher(ABC):
    """Moves the tokens of a MoE layer to the ranks of their experts and back.

    Every rank issues the same collectives whatever its data; a rank or an expert without tokens takes part with size zero.

    Args:
        config: What the user chose.
        num_experts: E.
        top_k: K.
        axes: Over which the experts are spread.
    """

    def __init__(self, config: DispatchConfig, num_experts: int, top_k: int, axes: ExpertAxes = ExpertAxes()) -> None:
        self.config, self.num_experts, self.top_k = config, num_experts, top_k
        self.ep, self.etp, self.etp_ep = axes.ep, axes.etp, axes.etp_ep
        self.local_experts = num_experts // axes.ep.size

    @property
    def experts_per_chunk(self) -> list[int]:
        """Experts at home here of each parcel; their sum is L."""
        return [self.local_experts]

    @abstractmethod
    def dispatch_preprocess(self, x_TD: Tensor, choices: Choices) -> list[Parcel]:
        """Sorts the choices and agrees on who sends how much.

        Args:
            x_TD: Tokens.
            choices: Their experts.

        Returns:
            The parcels, one for each chunk of experts.
        """

    def copy_plan(self, parcels: list[Parcel]) -> CopyPlan | None:
        """Which experts compute on other ranks too in this pass; None where copies are not asked for.

        Where there are any, the last parcel is that of this rank's copies.
        """
        return getattr(parcels[0].plan, "experts", None)

    @abstractmethod
    def token_dispatch(self, parcel: Parcel) -> Parcel:
        """Sends a parcel off; it may be under way when this returns."""

    @abstractmethod
    def dispatch_postprocess(self, parcel: Parcel) -> tuple[Tensor, ExpertRows]:
        """Waits for a parcel: tokens ``[A, D]``, and what the experts do with them."""

    @abstractmethod
    def combine_preprocess(self, y_AD: Tensor, plan: Any) -> Tensor:
        """Sums the parts of each expert over etp."""

    @abstractmethod
    def token_combine(self, y_AD: Tensor, plan: Any) -> Return:
        """Sends results home; they may be under way when this returns."""

    @abstractmethod
    def combine_postprocess(self, returns: list[Return], plans: list[Any]) -> Tensor:
        """Waits for all chunks and sums each token's rows, ``[T, D]``; zero for tokens that nobody served."""


def expert_of_rows(counts_XL: Tensor, rows: int) -> Tensor:
    """Expert of each row, where blocks X follow each other and have ``counts_XL`` rows of each expert; ``[rows]``."""
    blocks, local = counts_XL.shape
    expert = torch.arange(local, device=counts_XL.device).repeat(blocks)
    return expert.repeat_interleave(counts_XL.reshape(-1), output_size=rows)

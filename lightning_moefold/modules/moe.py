# SPDX-License-Identifier: Apache-2.0
"""The Mixture-of-Experts layer.

Legend: T tokens of this rank, K experts per token, R rows sent, M rows computed here, D hidden size, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_moefold import comm
from lightning_moefold.balance.fast import CopyCounter, FastPolicy
from lightning_moefold.balance.placement import Placement, check_successor
from lightning_moefold.dispatch import Choices, DispatchConfig, ExpertAxes, Return, make_dispatcher, settle
from lightning_moefold.dispatch.capacity import keep_within_capacity
from lightning_moefold.errors import InputError
from lightning_moefold.kernels.fan_out import fan_out
from lightning_moefold.mesh import FoldedMesh
from lightning_moefold.modules.balance import Routing
from lightning_moefold.modules.base import Linear, ParallelRoot, placed
from lightning_moefold.modules.experts.experts import Experts, RoutedExperts
from lightning_moefold.modules.experts.module_experts import ModuleExperts
from lightning_moefold.modules.experts.packed import PackedExperts
from lightning_moefold.modules.mlp import GatedMLP
from lightning_moefold.modules.recompute import counted_once, is_recomputing
from lightning_moefold.modules.routers import Router, RouterOptions, RouterOutput, RouterSpec, make_router
from lightning_moefold.modules.routers.statistics import count_choices, routing_table
from lightning_moefold.modules.sequence import SequenceBatch
from lightning_moefold.modules.standalone import run_standalone


class MoELayer(ParallelRoot):
    """Router, dispatcher, experts, and an optional shared expert; takes and returns ``[..., hidden_size]``.

    Args:
        hidden_size: Size of hidden states, D.
        num_experts: Number of experts, E.
        top_k: Number of experts per token.
        ffn_hidden_size: Width of each gated expert, or the widths of all of them, which may differ and be 0
            (:class:`~.experts.packed.PackedExperts`).
        expert: Function that makes one expert, instead of gated experts: any module from ``[rows, D]`` to ``[rows, D]``
            (:class:`~.module_experts.ModuleExperts`).
        router: The router that chooses experts: :class:`~.routers.RouterOptions`, the name of a registered router, a
            mapping of options, or a function that makes a router from D, E and K.
        shared_ffn_hidden_size: Width of the shared expert, which every token uses; 0 for none.
        shared_gate: Whether to scale the shared expert by ``sigmoid(shared_expert_gate(x))`` (Qwen2-MoE).
        activation: Activation function of all gated experts.
        dispatch: How tokens travel to experts, and how many tokens an expert serves. By default the strategy's
            dispatch arguments; dropless without a strategy.
        keep_routing: Whether to keep the statistics of the latest training forward pass for
            :func:`~.balance.load_balancing_loss` (a language model does not need this).

    Attributes:
        routing: Statistics of the latest forward pass, with ``keep_routing``; None if that was in evaluation.
        load_E: How often each expert was chosen on this rank in training since the counter was last reset (int64;
            without padding). By logical number, wherever the experts are.
        dropped_E: How many of these choices were dropped because the expert was full (int64; 0 if dropless).
        copies: Counters of expert copies in training since the last reset.
        placement: Which ep rank holds which expert, and in which slot of its stacks; :meth:`place` changes it.

    Raises:
        ValueError: Unless either ``ffn_hidden_size`` or ``expert`` is given.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        ffn_hidden_size: int | Sequence[int] | None = None,
        *,
        expert: Callable[[], nn.Module] | None = None,
        router: RouterSpec | Callable[[int, int, int], Router] = RouterOptions(),
        shared_ffn_hidden_size: int = 0,
        shared_gate: bool = True,
        activation: str = "silu",
        dispatch: DispatchConfig | None = None,
        keep_routing: bool = False,
    ) -> None:
        super().__init__()
        if (ffn_hidden_size is None) == (expert is None):
            raise InputError(
                "a MoELayer needs either ffn_hidden_size, for gated experts, or expert, which makes one; give one."
            )
        self.hidden_size, self.num_experts, self.top_k = hidden_size, num_experts, top_k
        make = router if callable(router) else partial(make_router, router)
        self.gate = make(hidden_size, num_experts, top_k)
        self.experts: RoutedExperts
        packed = isinstance(ffn_hidden_size, Sequence)
        if isinstance(ffn_hidden_size, Sequence):
            self.experts = PackedExperts(hidden_size, ffn_hidden_size, activation)
            self.experts.check_number(num_experts)
        elif ffn_hidden_size is not None:
            self.experts = Experts(hidden_size, num_experts, ffn_hidden_size, activation)
        elif expert is not None:
            self.experts = ModuleExperts(expert, num_experts)
        self.shared_expert = (
            GatedMLP(hidden_size, shared_ffn_hidden_size, activation, uneven=packed) if shared_ffn_hidden_size else None
        )
        self.shared_expert_gate = Linear(hidden_size, 1) if shared_ffn_hidden_size and shared_gate else None
        self.dispatch = dispatch
        self._dispatch_by_default = DispatchConfig()
        self.dispatcher = make_dispatcher(dispatch or DispatchConfig(), num_experts, top_k)
        self.keep_routing = keep_routing
        self.routing: Routing | None = None
        # Not buffers, which the strategy makes equal on all ranks before each step; each rank has its own counters.
        self.load_E = torch.zeros(num_experts, dtype=torch.int64)
        self.dropped_E = torch.zeros(num_experts, dtype=torch.int64)
        self.copies = CopyCounter()
        self.placement = Placement.contiguous(num_experts, 1)
        self._slot_E: Tensor | None = None  # until an expert has moved
        # Rows of each expert at the latest move, and the rows that each ep rank had computed by then.
        self._rows_then_E: Tensor | None = None
        self._earlier_rows_P: Tensor | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MoELayer:
        """Moves the counters with the layer and resets them."""
        super()._apply(fn, recurse)
        self.load_E, self.dropped_E = (
            torch.zeros_like(fn(counter), dtype=torch.int64) for counter in (self.load_E, self.dropped_E)
        )
        self._earlier_rows_P = self._rows_then_E = None
        if self._slot_E is not None:
            self._slot_E = torch.tensor(self.placement.slot_of_expert, device=self.load_E.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the routing out of copies and pickles, because it is part of an autograd graph."""
        return self.__dict__ | {"routing": None}

    def place(self, placement: Placement) -> None:
        """Sends tokens to their experts under another placement from now on; the caller must move the weights.

        Args:
            placement: Placement of the layer's experts over ep.

        Raises:
            InputError: If the placement has other numbers of experts or parts.
        """
        check_successor(self.placement, placement)
        self._earlier_rows_P, self._rows_then_E = self.part_rows(), self._rows_E()
        self.placement = placement
        slot_E = torch.tensor(placement.slot_of_expert, device=self.load_E.device)
        if self._slot_E is not None:
            self._slot_E.copy_(slot_E)  # compiled layers read the same tensor
        elif not placement.is_contiguous:
            self._slot_E = slot_E

    @property
    def dropped(self) -> Tensor:
        """Number of choices of :attr:`load_E` that were dropped, of all experts (int64 scalar)."""
        return self.dropped_E.sum()

    def _rows_E(self) -> Tensor:
        return self.load_E - self.dropped_E

    def part_rows(self) -> Tensor:
        """Returns how many choices of :attr:`load_E` each ep rank computed, by the placement at that time, ``[P]``."""
        since_E = self._rows_E() if self._rows_then_E is None else self._rows_E() - self._rows_then_E
        rows_S = since_E if self._slot_E is None else since_E[self._slot_E.argsort()]
        rows_P = rows_S.view(self.placement.parts, -1).sum(1)
        return rows_P if self._earlier_rows_P is None else rows_P + self._earlier_rows_P

    def gained_rows(self) -> Tensor | None:
        """Returns the extra rows that each ep rank has computed because of copies, ``[P]``.

        One of the ranks that share a plan returns them and the others None, so that a sum over ranks counts them once. Added to the
        sum of :meth:`part_rows`, they give the rows that each ep rank has computed.
        """
        gained_R = self.copies.gained_R
        if gained_R is None or self.dispatcher.etp_ep.index:
            return None
        return torch.from_numpy(gained_R).to(self.load_E.device)

    def reset_load(self) -> None:
        """Sets the counters to zero."""
        self.load_E.zero_()
        self.dropped_E.zero_()
        self._earlier_rows_P = self._rows_then_E = None

    def make_groups(self, mesh: FoldedMesh) -> None:
        """Creates the groups of a hierarchical exchange."""
        ExpertAxes.of(mesh, self.settled(mesh))

    def use_dispatch(self, config: DispatchConfig) -> None:
        """Sets the dispatch of the strategy, used from the next :meth:`bind` on if the layer has no dispatch of its own.

        Args:
            config: The strategy's dispatch. Its ``node_size`` also applies to a layer's own dispatch without one.
        """
        self._dispatch_by_default = config

    def settled(self, mesh: FoldedMesh) -> DispatchConfig:
        """Returns the dispatch under a fold: the layer's own or the strategy's, with ``"auto"`` resolved."""
        default = self._dispatch_by_default
        config = self.dispatch or default
        config = replace(config, node_size=config.node_size or default.node_size)
        return settle(config, self.num_experts, self.top_k, mesh.fold)

    def bind(self, mesh: FoldedMesh) -> None:
        """Creates the dispatcher for this fold."""
        super().bind(mesh)
        config = self.settled(mesh)
        if config.copies is not None:
            self.experts.check_copies()
            numbers = sum(p.numel() for p in self.experts.parameters()) + self.experts.numbers_in_bytes
            weights = -(-numbers // (self.num_experts * mesh.fold.etp))
            config = replace(config, copies=config.copies.priced(mesh.device_type, weights, mesh.fold.ep))
        if self.placement.parts != mesh.fold.ep:  # else experts may have moved already
            self.placement = Placement.contiguous(self.num_experts, mesh.fold.ep)
        self.dispatcher = make_dispatcher(config, self.num_experts, self.top_k, ExpertAxes.of(mesh, config))

    def plan_copies_by(self, policy: FastPolicy) -> None:
        """Plans copies from here on by another policy; between two steps, on all ranks alike."""
        config = self.dispatcher.config
        assert config.copies is not None, "the layer was set up without copies"
        self.dispatcher.config = replace(config, copies=replace(config.copies, policy=policy))

    def forward(self, hidden: Tensor, batch: SequenceBatch | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Routes each token through its experts.

        Args:
            hidden: This rank's tokens ``[T, D]``; without ``batch``, ``[..., D]``, the same on every tp rank.
            batch: Description of the batch: padding, and whether to return routing statistics.

        Returns:
            A tensor of the shape of ``hidden``; if the batch asks for routing statistics, also their table
            (:mod:`.routers.statistics`).
        """
        if batch is None:
            whole = hidden.dim() > 2 and self.rows is None
            rows = SequenceBatch(hidden[..., 0, 0].numel(), hidden.shape[-2], tp=self.tp) if whole else None
            return run_standalone(self, hidden, rows)
        readers = 2 + (self.shared_expert is not None) + (self.shared_expert_gate is not None)
        x_TD, *readers_TD = fan_out(hidden, readers)
        routed: RouterOutput = self.gate(x_TD, batch)
        expert_TK = routed.expert_TK
        counts_GE = count_choices(expert_TK, self.num_experts, batch)
        kept_TK, served = self._served(expert_TK, routed.probability_TE, batch)
        if self.training and not is_recomputing():
            self._count(counts_GE.sum(0), expert_TK, kept_TK)
        capacity = self._padded_capacity(hidden.shape[0], batch)
        # From here on experts are known by their slots.
        slot_TK = expert_TK if self._slot_E is None else self._slot_E[expert_TK]
        choices = Choices(routed.weight_TK, slot_TK, kept_TK, served, capacity)
        if self.dispatcher.etp_ep.size == 1:
            y_TD = self._routed(readers_TD, choices, batch)
        else:  # the number of received rows differs from step to step
            y_TD = comm.uncompiled(self._routed, readers_TD, choices, batch)
        if batch.wants_routing:
            return y_TD, routing_table(routed, counts_GE, batch)
        if self.keep_routing:
            # None in evaluation; otherwise a loss computed there would be that of the latest training batch.
            batch.wants_z_loss = True
            table_SE = routing_table(routed, counts_GE, batch) if self.training else None
            dtype = routed.probability_TE.dtype
            self.routing = None if table_SE is None else Routing(table_SE, self.top_k, self.mesh, dtype)
        return y_TD

    def prepare(self, batch: SequenceBatch, device: torch.device) -> None:
        """Computes what the layers of a batch share, before compiled code needs it."""
        if self.dispatcher.config.capacity_factor is not None:
            batch.places(device)
        if self.training and (self.gate.call is not None or self.experts.drops):
            batch.token_places(device)

    def _count(self, counts_E: Tensor, expert_TK: Tensor, kept_TK: Tensor | None) -> None:
        learning = torch.is_grad_enabled()
        with torch.no_grad():
            if self.dispatcher.config.capacity_factor is not None and kept_TK is not None:
                kept_E = torch.zeros_like(self.dropped_E).index_add_(0, expert_TK.flatten(), kept_TK.flatten().long())
                self.dropped_E += counted_once(counts_E - kept_E)
            counts_E = counted_once(counts_E)
            self.load_E += counts_E
            if learning:
                self.gate.count(counts_E)

    def _served(
        self, expert_TK: Tensor, probability_TE: Tensor, batch: SequenceBatch
    ) -> tuple[Tensor | None, int | None]:
        """Returns which choices are served, ``[T, K]`` or ``[T, 1]``, and their number if the host knows it."""
        config = self.dispatcher.config
        if config.capacity_factor is None:
            routed_T, k = batch.routed_T, self.top_k
            if routed_T is None:
                return None, None
            return routed_T.unsqueeze(1), None if batch.num_routed is None else batch.num_routed * k
        score_TK = probability_TE.detach().gather(1, expert_TK)
        places = batch.places(expert_TK.device)
        kept_TK = keep_within_capacity(
            expert_TK, score_TK, places, batch.counted_T, self.num_experts, config, batch.tp, batch.layout.cp
        )
        return kept_TK, None

    def _routed(self, readers_TD: Sequence[Tensor], choices: Choices, batch: SequenceBatch) -> Tensor:
        """Runs routed and shared experts. One half of the shared expert overlaps with dispatch, the other half with combine.

        Args:
            readers_TD: The tokens, once for the routed experts, the shared expert, and its gate, each as far as there is one.
            choices: Where each token goes.
            batch: Description of the batch.
        """
        dispatcher, (x_TD, *shared_TD) = self.dispatcher, readers_TD
        returns: list[Return] = []
        parcels = dispatcher.dispatch_preprocess(self.experts.travelling(x_TD, batch), choices)
        parcels[0] = dispatcher.token_dispatch(parcels[0])  # drops the list's reference to the sent rows

        def visit_experts() -> None:
            returns.extend(self.experts(parcels, dispatcher))
            plan = dispatcher.copy_plan(parcels)
            if plan is not None and self.training and torch.is_grad_enabled() and not is_recomputing():
                self.copies.count(plan, self.experts.copy_bytes)

        change_TD = self._around_shared_expert(shared_TD, batch, visit_experts)
        y_TD = dispatcher.combine_postprocess(returns, [parcel.plan for parcel in parcels])
        return y_TD if change_TD is None else y_TD + change_TD

    def _around_shared_expert(
        self, readers_TD: Sequence[Tensor], batch: SequenceBatch, halfway: Callable[[], None]
    ) -> Tensor | None:
        """Runs the shared expert, with ``halfway`` called in its middle; returns None if there is no shared expert."""
        if self.shared_expert is None:
            halfway()
            return None
        shared_TD = self.shared_expert(readers_TD[0], batch, halfway)
        if self.shared_expert_gate is not None:
            x_TD, gate = readers_TD[1], self.shared_expert_gate
            shared_TD = gate(x_TD, **placed(gate, batch.own_tokens(x_TD.device))).sigmoid() * shared_TD
        return shared_TD

    def _padded_capacity(self, tokens: int, batch: SequenceBatch) -> int | None:
        """Returns how many rows of a rank's tokens an expert serves at most, from shapes only; None if nothing is padded.

        Without gradients nothing is padded, because ranks may have batches of different shapes, or none
        (:class:`~.models.join.JoinCalls`).
        """
        config = self.dispatcher.config
        if not config.pad_to_capacity or not torch.is_grad_enabled():
            return None
        if config.drop_scope == "sub_sequence":
            return config.capacity(tokens, self.top_k, self.num_experts)
        return min(tokens, batch.rows * config.capacity(batch.layout.length, self.top_k, self.num_experts))

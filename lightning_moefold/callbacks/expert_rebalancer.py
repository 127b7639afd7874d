# SPDX-License-Identifier: Apache-2.0
"""ExpertRebalancer: moves experts to other ranks while training, where that pays."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from typing_extensions import override

from lightning_moefold import comm
from lightning_moefold.agreement import agreeing
from lightning_moefold.balance.assignment import Counts
from lightning_moefold.balance.costs import MARGIN, BalanceCosts
from lightning_moefold.balance.fast import FAST_POLICIES, ExpertCopies
from lightning_moefold.balance.past import PastCopies
from lightning_moefold.balance.placement import Placement
from lightning_moefold.balance.policies import make_policy
from lightning_moefold.balance.policies.base import CopiesFrom
from lightning_moefold.balance.policies.joint import Joint
from lightning_moefold.balance.pool import PlacementPool
from lightning_moefold.balance.slow import HORIZON, Decision, Place, SlowLoop
from lightning_moefold.callbacks.balance_statistics import rank_imbalance
from lightning_moefold.callbacks.common import fold_strategy, log_file, log_values
from lightning_moefold.callbacks.expert_load import LoadReader
from lightning_moefold.callbacks.placement_history import PlacementHistory
from lightning_moefold.errors import InputError
from lightning_moefold.lifecycle.fold_choice import announce
from lightning_moefold.modules import MoELayer
from lightning_moefold.parallel.migration import check_movable, drop_gradients, size_of_expert
from lightning_moefold.plots.files import EXPERT_PLACEMENT
from lightning_moefold.strategy import MoEFoldStrategy


class ExpertRebalancer(pl.Callback):
    """Moves experts to other ranks of ep between steps, so that no rank has much more to compute than the others.

    The run stays the same: an expert moves with all its optimizer state, router and counts know experts by number, and
    checkpoints hold them in that order, whatever the placement. Every ``interval`` steps the counts of all layers are summed
    (one all-reduce of a small table), ``policy`` proposes a placement for each layer, and the proposal is taken where its
    predicted gain outweighs the cost of moving, which is measured with the first move. Where nothing is to be gained, a
    line says why, and nothing else happens.

    Logs at each check ``balance/imbalance`` (mean over layers of the busiest rank's rows over the mean, since the last check),
    ``balance/imbalance_predicted`` (what it would have been with what is decided now), ``balance/moves`` and
    ``balance/moved_bytes`` (so far, all ranks), and, of the latest migration, ``balance/predicted_gain_s`` and
    ``balance/measured_gain_s`` for each step and ``balance/move_s``.

    When training ends, ``expert_placement.npz`` in the Trainer's ``log_dir`` holds where experts were at each check and what each
    rank computed; ``moefold plot`` draws it.

    Args:
        policy: How experts are placed: a name in :data:`~.balance.policies.POLICIES`, or a function ``(load_NE, current, costs) ->
            Placement`` of past rows, the placement and constants (:class:`~.balance.costs.BalanceCosts`), which must say the same
            on every rank.
        interval: Optimizer steps between checks; ``"auto"`` looks after 8 steps, sooner again after a move, and ever more rarely
            while nothing moves.
        margin: Part of a layer's time that a move must gain, besides the time that it takes; 0 moves whenever the prediction is
            better, whatever that takes.
        history: Past intervals whose counts the policy sees.
        max_copies_per_rank: Experts that a rank may compute for a pass besides its own.
        fast: Also copy busy experts for one pass (:class:`~lightning_moefold.balance.fast.ExpertCopies`), if the policy plans
            copies from the counts of a pass, nothing is padded, and the strategy has no ``expert_copies`` of its own. False
            plans the copies of ``"joint"`` from past loads at each check, as ``"eplb"`` and ``"flexmoe"`` always do; they
            still exist for one pass only.
        slow: Move experts; False leaves them at home, and only what is logged remains of the checks.
        pool: File of placements that ``moefold balance TRACE --write-pool FILE`` found for this model; at each check they are
            weighed beside what the policy proposes.

    Attributes:
        moves: Experts that have changed their rank so far, over all layers.
        decision: The latest one.

    Raises:
        InputError: For a policy that is not known or numbers out of range; in ``fit``, for a strategy, a fold or experts with
            which nothing can move.

    Example::

        trainer = L.Trainer(strategy=MoEFoldStrategy(expert_parallel_size=8), callbacks=[ExpertRebalancer()])
    """

    def __init__(
        self,
        policy: str | Place = "joint",
        *,
        interval: int | Literal["auto"] = "auto",
        margin: float = MARGIN,
        history: int = 8,
        max_copies_per_rank: int = 2,
        fast: bool = True,
        slow: bool = True,
        pool: str | Path | None = None,
    ) -> None:
        super().__init__()
        if pool is not None and not slow:
            raise InputError(
                "pool offers placements to move experts to, and slow=False moves none; leave one of them out."
            )
        self._pool = None if pool is None else PlacementPool.load(pool)
        self._past, self._copies, self._slow = None, None, slow
        if isinstance(policy, str):
            made = (
                Joint(max_copies_per_rank, fast=fast)
                if policy == Joint.name
                else make_policy(policy, max_copies_per_rank)
            )
            if made.copies is CopiesFrom.PAST:
                self._past, self._copies = made, ExpertCopies(PastCopies(made), max_copies_per_rank)
            elif fast and policy in FAST_POLICIES:
                self._copies = ExpertCopies(policy, max_copies_per_rank)
        self._shares: dict[str, Counts] = {}
        self._history = PlacementHistory()
        self.moves, self.decision = 0, Decision()
        self._loop = SlowLoop(policy, interval, margin, history)
        self._reader: LoadReader | None = None
        self._byte_ps: int | None = None  # once measured
        self._costs: BalanceCosts | None = None
        self._placements: dict[str, Placement] = {}
        self._bytes = self._seen_step = self._counted_from = 0
        self._since = 0.0
        self._said = ""
        self._layers: list[MoELayer] = []
        self._figures: dict[str, float] = {}
        #: Seconds of a step before the latest migration, while the interval after it runs.
        self._watching: float | None = None

    @property
    def copies(self) -> int:
        """Copies that all ranks of ep have made so far in the layers of this rank."""
        return sum(layer.copies.copies for layer in self._layers)

    # ---- the run -----------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        strategy = trainer.strategy
        if stage == "fit":  # a checkpoint is read after this
            self._shares, self._watching = {}, None
            self._loop.forget()
            if self._copies is not None and isinstance(strategy, MoEFoldStrategy):
                strategy.copy_experts(self._copies)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        strategy = trainer.strategy
        if not isinstance(strategy, MoEFoldStrategy):
            raise InputError(
                "ExpertRebalancer moves experts between ranks of MoEFoldStrategy, and the strategy is "
                f"{type(strategy).__name__}; use strategy='moefold', or leave it out."
            )
        if strategy.fold.ep == 1:
            raise InputError(
                f"ExpertRebalancer has nothing to move under {strategy.fold}, because with ep=1 every rank holds all experts; use "
                "expert_parallel_size=2 or more, or leave it out."
            )
        if strategy.settings.dispatch.pad_to_capacity:
            raise InputError(
                "ExpertRebalancer has nothing to gain with pad_to_capacity=True, which has every expert compute equally many rows; "
                "leave one of them out."
            )
        copies = strategy.settings.dispatch.copies
        self._loop.expect_copies(0 if copies is None else copies.max_copies_per_rank)
        with agreeing(strategy.mesh.world, InputError):  # maybe of one pipeline stage
            for name, layer in strategy.registry.moe_layers().items():
                check_movable(name, layer)
        self._layers = [layer for layer in pl_module.modules() if isinstance(layer, MoELayer)]
        if not strategy.registry.everyones_placements():
            raise InputError(f"ExpertRebalancer found no MoELayer in {type(pl_module).__name__}; leave it out.")

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._reader = LoadReader(trainer, pl_module)
        self._placements = fold_strategy(trainer).registry.everyones_placements()
        if self._pool is not None:
            number = float(self._pool.fingerprint)
            if sum(self._slowest(trainer, number, -number)):
                raise InputError("the file of pool is not the same on all ranks; give every node the same file.")
            self._loop.offer(self._pool.by_name([row.name for row in self._reader.rows], self._placements))
        self._costs, self._history = None, PlacementHistory(trainer.global_step)
        self._loop.start(trainer.global_step)
        if self._plans_from_past(trainer):
            self._copy_from_past(trainer, self._constants(trainer))
        self._begin_interval(trainer)

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any, **__: Any) -> None:
        step, before = trainer.global_step, self._seen_step
        self._seen_step = step
        if step > before and self._loop.is_due(step):
            self._check(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        path = log_file(trainer, EXPERT_PLACEMENT)
        if trainer.is_global_zero and path is not None and self._history.steps:
            self._history.save(path)

    def _begin_interval(self, trainer: pl.Trainer) -> None:
        self._seen_step = self._counted_from = trainer.global_step
        self._since = time.perf_counter()

    def _check(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Looks at the loads, decides, and moves. Collective."""
        assert self._reader is not None
        step = trainer.global_step
        load = self._reader.read()
        steps = step - self._counted_from
        seconds = (time.perf_counter() - self._since) / max(1, steps)
        costs = self._constants(trainer)
        passes = max(1, steps) * costs.passes * fold_strategy(trainer).fold.edp
        rows = {
            row.name: (counts_E + passes // 2) // passes
            for row, counts_E in zip(self._reader.rows, load.served_by_layer(), strict=True)
        }
        if self._watching is not None:
            (after,) = self._slowest(trainer, seconds)
            self._figures["balance/measured_gain_s"] = self._watching - after
            self._watching = None
        if trainer.is_global_zero:
            self._history.add(step, load, self._placements)
        ends = trainer.estimated_stepping_batches
        # Lightning counts the steps to come by the present number of accumulated batches.
        left = int(ends) - step if np.isfinite(ends) and ends >= step else HORIZON
        decision = self._loop.decide(step, rows, self._placements, costs, left)
        if decision.placements and not self._slow:
            decision = Decision(before=decision.before, after=decision.before, reason="slow=False moves nothing")
        self.decision = decision
        if self.decision.placements:
            self._move(trainer, self.decision.placements, seconds)
        if self._plans_from_past(trainer):
            self._copy_from_past(trainer, costs)
        self._say(trainer, step)
        self._figures |= {
            "balance/imbalance": rank_imbalance(load.rank_rows_LR) or 1.0,
            "balance/imbalance_predicted": self.decision.after,
            "balance/moves": float(self.moves),
            "balance/moved_bytes": float(self._bytes),
        }
        log_values(trainer, module, self._figures)
        self._begin_interval(trainer)

    def _move(self, trainer: pl.Trainer, placements: dict[str, Placement], seconds: float) -> None:
        strategy = fold_strategy(trainer)
        if trainer.lightning_module.automatic_optimization:
            drop_gradients(strategy.registry, placements)  # the step has used them up
        began = time.perf_counter()
        moved = strategy.move_experts(placements)
        if strategy.root_device.type == "cuda":
            torch.cuda.synchronize(strategy.root_device)
        took = time.perf_counter() - began
        slowest, sent, before = self._slowest(trainer, took, float(moved.sent_bytes), seconds)
        sent_bytes = torch.tensor(moved.sent_bytes, dtype=torch.int64, device=strategy.root_device)
        self._bytes += int(comm.all_reduce_raw(sent_bytes, strategy.mesh.world))
        self.moves += self.decision.moved
        self._placements |= placements
        if sent > 0:
            self._byte_ps, self._costs = max(1, round(slowest / sent * 1e12)), None
        self._watching = before
        self._figures |= {"balance/predicted_gain_s": self.decision.gain_ps / 1e12, "balance/move_s": slowest}

    def _plans_from_past(self, trainer: pl.Trainer) -> bool:
        return self._past is not None and fold_strategy(trainer).settings.dispatch.copies is self._copies

    def _copy_from_past(self, trainer: pl.Trainer, costs: BalanceCosts) -> None:
        """Plans copies until the next check from what was counted so far."""
        policy = self._past
        assert policy is not None
        for name, layer in fold_strategy(trainer).registry.moe_layers().items():
            load_NE, placement = self._loop.past(name), layer.placement
            if not load_NE.sum() or layer.dispatcher.config.copies is None:  # nothing counted, or a dispatch of its own
                continue
            held_RE = self._shares.get(name, np.zeros((placement.parts, placement.num_experts), dtype=np.int64))
            owner_E = np.asarray(placement.part_of_expert)
            self._shares[name] = policy.replicas(load_NE, held_RE, owner_E, costs)
            layer.plan_copies_by(PastCopies.of(policy, self._shares[name], placement))

    def _say(self, trainer: pl.Trainer, step: int) -> None:
        """A line for each migration, and one where it leaves things alone for another reason than at the last check."""
        decision, said = self.decision, self._said
        self._said = decision.kind
        if not trainer.is_global_zero:
            return
        if decision.placements:
            announce(
                f"ExpertRebalancer moved {decision.moved} experts after step {step}: the busiest rank had {decision.before:.3g} "
                f"times the mean, and would have had {decision.after:.3g} times."
            )
        elif said != decision.kind:
            announce(f"ExpertRebalancer leaves the experts where they are after step {step}: {decision.reason}.")

    # ---- what ranks agree on -----------------------------------------------------------------------------------

    def _constants(self, trainer: pl.Trainer) -> BalanceCosts:
        """Constants that every rank has. Collective where they change."""
        if self._costs is None:
            strategy = fold_strategy(trainer)
            with agreeing(strategy.mesh.world, InputError):
                sizes = size_of_expert(strategy.registry, strategy.optimizers)
            weights, held = (int(size) for size in self._slowest(trainer, *map(float, sizes)))
            self._costs = BalanceCosts.assumed(
                strategy.root_device.type,
                weights,
                parts=strategy.fold.ep,
                byte_ps=self._byte_ps,
                move_bytes=held,
            )
        # Without a pipeline, micro-batches of a batch pass a layer together.
        settings, fold = fold_strategy(trainer).settings, fold_strategy(trainer).fold
        passes = trainer.accumulate_grad_batches * (settings.num_microbatches if fold.pp > 1 else 1)
        return replace(self._costs, passes=passes)

    def _slowest(self, trainer: pl.Trainer, *values: float) -> list[float]:
        """The largest of each value over all ranks, the same on every rank. Collective."""
        world = fold_strategy(trainer).mesh.world
        table = torch.zeros(world.size, len(values), dtype=torch.float64, device=trainer.strategy.root_device)
        table[world.index] = torch.tensor(values, dtype=torch.float64)
        return [float(value) for value in comm.all_reduce_raw(table, world).amax(0)]

    # ---- checkpoints -------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"loop": self._loop.state_dict(), "byte_ps": self._byte_ps, "moves": self.moves, "bytes": self._bytes}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loop.load_state_dict(state_dict["loop"])
        self._byte_ps, self.moves, self._bytes = (state_dict[key] for key in ("byte_ps", "moves", "bytes"))

# SPDX-License-Identifier: Apache-2.0
"""The search under one sharding and routing profile: every legal fold x micro-batch x schedule x recomputation x dispatcher.

The search is exhaustive, except that two bounds discard folds that cannot be better than those already kept: a fold
whose layers alone, without any waiting or sharding, take longer than the worst plan kept, and a fold whose weights and
states alone do not fit.
Recomputation is tried from none upwards and stops at the first setting that fits, since more recomputation only costs
time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import gcd
from typing import cast

from lightning_moefold.errors import FoldError, PlanError
from lightning_moefold.fold import Fold, FoldableConfig, divisors
from lightning_moefold.models.blocks import check_blocks
from lightning_moefold.parallel.pipeline.plan import V_SHAPED
from lightning_moefold.planner.cost.cost import CostModel, Estimate
from lightning_moefold.planner.cost.layer import LayerCosts
from lightning_moefold.planner.cost.schedules import legal, pipeline_layout
from lightning_moefold.planner.search.job import OFFLOADS, Job, Plan
from lightning_moefold.planner.search.space import Space, legal_folds, micro_batches


@dataclass(frozen=True)
class Result:
    """The result of a search.

    Args:
        job: The planned job.
        plans: The plans, best first. Plans that do not fit are left out unless none fits.
        plain: The best plan of plain expert parallelism (only ep), whether it fits or not.
        examined: Number of folds examined.
        pool: For each routing profile by which plans were ranked, the plan that is best under it.
    """

    job: Job
    plans: list[Estimate]
    plain: Estimate | None
    examined: int
    pool: dict[str, Estimate] = field(default_factory=dict)

    @property
    def best(self) -> Estimate:
        """The best plan."""
        return self.plans[0]


class Planner:
    """Evaluates and searches plans of a job.

    Args:
        job: The training job, with its sharding and routing profile.
        space: The settings that may be chosen.
        layers: Layer costs of the same job, which may have another sharding; made if not given.

    Example::

        >>> job = Job(MODELS["mixtral-8x22b"], 128, PRESETS["dgx-h100"], 256, 4096, capacity_factor=1.0)
        >>> str(Planner(job).search().best.plan.fold)
    """

    def __init__(self, job: Job, space: Space | None = None, layers: LayerCosts | None = None) -> None:
        self.job, self.space = job, space or Space()
        if wrong := [name for name in self.space.dispatchers if name not in job.dispatchers]:
            raise PlanError(
                f"dispatcher={wrong[0]!r} neither pads to a capacity nor sends tokens in parts; use 'alltoall', or leave out "
                "pad_to_capacity and dispatch_chunks."
            )
        self._offloads = self.space.offloads or OFFLOADS[:1]
        if job.hardware.device == "cpu" and self._offloads != OFFLOADS[:1]:
            raise PlanError("offload moves nothing on CPU ranks, whose memory is the host's; leave it out.")
        self.costs = CostModel(job, layers)

    # ---- one fold ----------------------------------------------------------------------------------------------

    def plans(self, fold: Fold, micro_batch: int, dispatcher: str) -> Iterator[list[Plan]]:
        """Yields, for each schedule and offloading, the plans with each recomputation setting, fastest first."""
        microbatches = Plan(fold, micro_batch).num_microbatches(self.job)
        model, sharding = self.job.model, self.job.sharding
        for schedule, chunks in self._schedules(fold.pp):
            recomputes = [
                r for r in self.space.recomputes
                if legal(schedule, fold.pp, chunks, microbatches, model, sharding, r) is None
            ]  # fmt: skip
            for offload in self._offloads if recomputes else ():
                yield [Plan(fold, micro_batch, schedule, chunks, r, dispatcher, offload) for r in recomputes]

    def _schedules(self, pp: int) -> Iterator[tuple[str, int]]:
        layers = self.job.model.num_hidden_layers
        if pp == 1:
            yield "1f1b", 1
            return
        for schedule in self.space.schedules:
            choices = [2] if schedule in V_SHAPED else [1]
            if schedule.startswith("interleaved"):
                choices = [v for v in divisors(max(layers // pp, 1)) if v > 1 and layers % (pp * v) == 0] or [2]
                choices = [self.space.num_stages_per_rank] if self.space.num_stages_per_rank else choices
            for chunks in choices:
                yield schedule, chunks

    def evaluate(self, fold: Fold) -> list[Estimate]:
        """Returns the best plan of a fold for each micro-batch size, best first; plans that fit come before others.

        Raises:
            FoldError: If the fold cannot cut the model.
            PlanError: If dp does not divide the batch.
        """
        fold.validate(cast(FoldableConfig, self.job.model))
        if self.job.quantize is not None:
            check_blocks(self.job.model, fold)
        if fold.world_size != self.job.world_size:
            raise PlanError(f"the fold is for {fold.world_size} ranks, the job for {self.job.world_size}.")
        sizes = micro_batches(self.job, self.space, fold)
        if not sizes or self.job.global_batch_size % fold.dp:
            raise PlanError(
                f"global_batch_size={self.job.global_batch_size} does not split into micro-batches over dp={fold.dp}; "
                f"use a multiple of {fold.dp}."
            )
        found = [e for size in sizes if (e := self.best(fold, size)[0]) is not None]
        if not found:
            raise PlanError(f"no schedule of {', '.join(self.space.schedules)} runs fold {fold} with this batch.")
        return sorted(found, key=by_speed)

    def best(
        self, fold: Fold, micro_batch: int, slowest: float = float("inf"), only_fitting: bool = False
    ) -> tuple[Estimate | None, bool]:
        """Returns the best plan of a fold and micro-batch size, and whether memory did not matter for it.

        Where every schedule fits without recomputation under the fastest dispatcher, the other dispatchers and shardings,
        which save memory or nothing, cannot be faster.

        Args:
            fold: The sizes.
            micro_batch: Rows of a micro-batch.
            slowest: Seconds per step that a plan must beat.
            only_fitting: Whether to return None instead of a plan that does not fit.
        """
        bounds = {name: self.costs.lower_bound(fold, micro_batch, name) for name in self._dispatchers(fold)}
        best: Estimate | None = None

        def too_slow(bound: float) -> bool:
            return bound >= (min(slowest, best.step_time) if best is not None and best.fits else slowest)

        fastest = min(bounds, key=bounds.__getitem__)
        for dispatcher in sorted(bounds, key=bounds.__getitem__):
            if too_slow(bounds[dispatcher]):
                break
            ladders = [
                (bounds[dispatcher] + self.costs.least_bubble(ladder[0], bounds[dispatcher]), ladder)
                for ladder in self.plans(fold, micro_batch, dispatcher)
            ]
            settled = bool(ladders)
            for bound, ladder in sorted(ladders, key=lambda item: item[0]):
                if too_slow(bound):
                    break
                found = self._first_that_fits(ladder, only_fitting)
                settled &= found is not None and found.fits and found.plan.recompute == self.space.recomputes[0]
                if found is not None and (best is None or by_speed(found) < by_speed(best)):
                    best = found
            if settled:
                return best, best is not None and dispatcher == fastest
        return best, False

    def _first_that_fits(self, ladder: list[Plan], only_fitting: bool) -> Estimate | None:
        """Returns the first plan that fits, otherwise the last, which needs least memory, or None if only such are wanted."""
        *plans, last = ladder
        limit, memory = self.job.hardware.usable_bytes, self.costs.memory
        needed = memory.estimate(last)
        if only_fitting and needed.total > limit:
            return None
        for plan in plans:
            mine = memory.estimate(plan)
            if mine.total <= limit:
                return self.costs.estimate(plan, mine)
        return self.costs.estimate(last, needed)

    # ---- all folds ---------------------------------------------------------------------------------------------

    def search(self, keep: int = 10) -> Result:
        """Ranks all folds, each by its best plan.

        Args:
            keep: Number of folds to keep.

        Raises:
            PlanError: If no fold is legal for the batch.
        """
        kept: dict[Fold, Estimate] = {}
        examined = self.collect(kept, keep)
        plain = self.plain()
        if plain is not None and plain.fits:
            kept.setdefault(plain.plan.fold, plain)
        return Result(self.job, sorted(kept.values(), key=by_speed) or [self.smallest()], plain, examined)

    def collect(
        self,
        kept: dict[Fold, Estimate],
        keep: int,
        others: Sequence[Planner] = (),
        order: Sequence[tuple[float, Fold, int]] | None = None,
    ) -> int:
        """Adds the best plans to ``kept``, which then has the ``keep`` fastest folds; returns how many were examined.

        Args:
            kept: The best plan of each fold so far.
            keep: Number of folds to keep.
            others: Planners of the same job under other shardings, which need less memory and are not faster.
            order: Folds and micro-batch sizes with lower bounds of their step time, the lowest first; by default those of
                :meth:`bounded`.
        """
        examined = 0
        slowest = max(e.step_time for e in kept.values()) if len(kept) >= keep else float("inf")
        planners = (self, *others)
        for bound, fold, size in planners[-1].in_order() if order is None else order:
            if bound >= slowest:
                break
            examined += 1
            for planner in planners:
                found, settled = planner.best(fold, size, slowest, only_fitting=True)
                if found is not None and (fold not in kept or found.step_time < kept[fold].step_time):
                    kept[fold] = found
                if settled:
                    break
            if len(kept) > keep:
                del kept[max(kept, key=lambda f: kept[f].step_time)]
            if len(kept) == keep:
                slowest = max(e.step_time for e in kept.values())
        return examined

    def in_order(self) -> list[tuple[float, Fold, int]]:
        """Returns the folds and micro-batch sizes of :meth:`bounded`, those with the lowest bounds first."""
        return sorted(self.bounded(), key=lambda item: item[0])

    def bounded(self) -> Iterator[tuple[float, Fold, int]]:
        """Yields folds and micro-batch sizes whose weights and states fit, with a lower bound of their step time."""
        for fold in legal_folds(self.job, self.space):
            if self._states(fold) > self.job.hardware.usable_bytes or not self._cuts_whole_blocks(fold):
                continue
            dispatchers = self._dispatchers(fold)
            for size in micro_batches(self.job, self.space, fold):
                yield self.costs.lower_bound(fold, size, *dispatchers), fold, size

    def _cuts_whole_blocks(self, fold: Fold) -> bool:
        """Whether a fold does not cut inside numbers that ``quantize`` rounds together."""
        try:
            if self.job.quantize is not None:
                check_blocks(self.job.model, fold)
        except FoldError:
            return False
        return True

    def _dispatchers(self, fold: Fold) -> tuple[str, ...]:
        """Returns the dispatchers that differ under a fold: without an exchange none do, and with one step two are the same."""
        names = self.space.dispatchers
        if fold.ep * fold.etp == 1:
            return names[:1]
        if "deduplicated" not in names or self.costs.layers.nodes(fold.ep, fold.etp, "hierarchical") > 1:
            return names
        return tuple(name for name in names if name != "hierarchical")

    def _states(self, fold: Fold) -> float:
        """Returns a lower bound of the memory: bytes of weights, gradients and moments on the last pipeline rank."""
        accumulates = self.job.global_batch_size // fold.dp > self.space.largest_micro_batch
        return sum(self.costs.memory.states(fold, pipeline_layout(self.job.model, fold.pp, 1, "1f1b")[-1], accumulates))

    def plain(self) -> Estimate | None:
        """Returns the best plan of plain expert parallelism: data parallel attention, no tp, cp, pp or etp."""
        job, found = self.job, []
        for ep in divisors(gcd(job.model.num_experts, job.world_size)):
            if self.space.data_parallel_size not in (None, job.world_size):
                break
            try:
                found.append(self.evaluate(Fold(job.world_size, expert_parallel_size=ep))[0])
            except (FoldError, PlanError):
                continue
        return min(found, key=by_speed, default=None)

    def smallest(self) -> Estimate:
        """Returns the plan that needs the least memory, if none fits; folds are tried in order of their weights and states.

        Raises:
            PlanError: If no fold is legal for the batch.
        """
        tightest = replace(
            self.space, recomputes=(self.space.recomputes[-1],), schedules=("1f1b",), offloads=self._offloads[-1:]
        )
        planner = Planner(self.job, tightest)
        best: Estimate | None = None
        for fold in sorted(legal_folds(self.job, self.space), key=self._states)[:200]:
            for size in micro_batches(self.job, self.space, fold)[:1]:
                found, _ = planner.best(fold, size)
                if found is not None and (best is None or found.memory.total < best.memory.total):
                    best = found
        if best is None:
            raise PlanError(
                f"no legal fold of {self.job.world_size} ranks takes a global batch of {self.job.global_batch_size} "
                "sequences: dp must divide it; raise the batch, or change the number of ranks."
            )
        return best


def by_speed(estimate: Estimate) -> tuple[bool, float]:
    """Sorting key: plans that fit first, by speed; then others, by memory."""
    return not estimate.fits, estimate.step_time if estimate.fits else estimate.memory.total

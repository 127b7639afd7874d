# SPDX-License-Identifier: Apache-2.0
"""The search that answers "what shall I run?": plans ranked by their steps under several routing profiles. Pure Python.

How evenly tokens will choose experts is not known before a run, and a MoE layer waits for its busiest rank. So each profile is
searched on its own, under every sharding; uneven ones over the most promising folds, if there are very many. The best plans under
the job's own profile, and the best three under each other one, are then predicted under all profiles, and ranked by the mean of
their seconds per step. A step that does not fit counts :data:`~.cost.NO_FIT` times, because such a run stops.

If no plan fits, all is searched once more with activations, the optimizer's state, or both in host memory.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace

from lightning_moefold.errors import PlanError
from lightning_moefold.fold import Fold
from lightning_moefold.planner.cost.cost import Estimate
from lightning_moefold.planner.cost.layer import LayerCosts
from lightning_moefold.planner.cost.routing import BALANCED, PROFILES, RoutingProfile
from lightning_moefold.planner.search.job import OFFLOADS, Job, Plan
from lightning_moefold.planner.search.search import Planner, Result, by_speed
from lightning_moefold.planner.search.space import Space

#: Plans that are taken from the search under a profile other than the job's.
_OF_OTHERS = 3
#: Folds and micro-batch sizes that such a search looks at, those with the lowest bounds; more only matter for thousands of ranks.
_MOST_EXAMINED = 5000
#: The planners of a routing profile, by sharding.
_Planners = dict[str, Planner]


def profiles_of(job: Job) -> tuple[RoutingProfile, ...]:
    """Returns the profiles by which a job's plans are ranked: all, or the job's own if it is not the default."""
    return tuple(PROFILES.values()) if job.routing == BALANCED else (job.routing,)


def search(
    job: Job, space: Space | None = None, keep: int = 10, profiles: Iterable[RoutingProfile] | None = None
) -> Result:
    """Ranks the folds of a job, each by its best plan.

    Args:
        job: The training job. Plans are reported under its routing profile.
        space: The settings that may be chosen.
        keep: Number of folds to keep.
        profiles: Routing profiles to rank by; by default those of :func:`profiles_of`.

    Raises:
        PlanError: If no fold is legal for the batch.
    """
    return _offloading_if_needed(lambda space: _search(job, space, keep, profiles), space)


def _offloading_if_needed(find: Callable[[Space], Result], space: Space | None) -> Result:
    """Tries offloading, too, if no plan fits, the user leaves it open, and the devices have memory of their own."""
    space = space or Space()
    result = find(space)
    if space.offloads is not None or result.best.fits or result.job.hardware.device == "cpu":
        return result
    return find(replace(space, offloads=OFFLOADS[1:]))


def _search(job: Job, space: Space, keep: int, profiles: Iterable[RoutingProfile] | None) -> Result:
    by_profile = _by_profile(job, space, profiles)
    found: list[Estimate] = []
    pool: dict[str, Estimate] = {}
    examined = 0
    own = by_profile[job.routing.name]
    order = [*own.values()][-1].in_order() if job.routing == BALANCED else None
    # No plan is faster under uneven routing than under balanced routing, whose bounds therefore serve every profile; unless
    # busy experts drop tokens, which makes uneven routing less work.
    drops = job.capacity_factor is not None and not job.pad_to_capacity
    for name, planners in by_profile.items():
        kept: dict[Fold, Estimate] = {}
        if planners is not own:  # begins with the plans found so far, to leave out those that are slower
            known = [planners[e.job.sharding].costs.estimate(e.plan) for e in found]
            best = sorted((e for e in known if e.fits), key=lambda e: e.step_time, reverse=True)
            kept = {e.plan.fold: e for e in best[-_OF_OTHERS:]}
        first, *others = planners.values()
        if planners is own:
            examined += first.collect(kept, keep, others, order)
        else:
            bounds = [*planners.values()][-1].in_order() if order is not None and drops else order
            examined += first.collect(kept, _OF_OTHERS, others, None if bounds is None else bounds[:_MOST_EXAMINED])
        found += kept.values()
        if kept:
            pool[name] = min(kept.values(), key=lambda e: e.step_time)
    plain = min((e for p in own.values() if (e := p.plain())), key=by_speed, default=None)
    if not found:
        smallest = min((p.smallest() for p in own.values()), key=lambda e: e.memory.total)
        return Result(smallest.job, [smallest], plain, examined)
    everywhere = (under_each(e, by_profile, job.routing.name) for e in found)
    ranked = _best_of_each(lambda plan: plan.fold, everywhere)[:keep]
    if plain is not None and plain.fits:
        plain = under_each(plain, by_profile, job.routing.name)
        if plain.plan.fold not in {e.plan.fold for e in ranked}:
            ranked.append(plain)
    pool = {name: under_each(e, by_profile, job.routing.name) for name, e in pool.items()}
    return Result(job, ranked, plain, examined, pool)


def evaluate(
    job: Job, fold: Fold, space: Space | None = None, profiles: Iterable[RoutingProfile] | None = None
) -> Result:
    """Evaluates one fold: its best plan for each micro-batch size, ranked as in :func:`search`.

    Raises:
        FoldError: If the fold cannot cut the model.
        PlanError: If dp does not divide the batch.
    """
    return _offloading_if_needed(lambda space: _evaluate(job, fold, space, profiles), space)


def _evaluate(job: Job, fold: Fold, space: Space, profiles: Iterable[RoutingProfile] | None) -> Result:
    by_profile = _by_profile(job, space, profiles)
    found: list[Estimate] = []
    refusals: list[PlanError] = []
    for planner in (p for planners in by_profile.values() for p in planners.values()):
        try:
            found += planner.evaluate(fold)
        except PlanError as error:  # a schedule that one sharding does not allow, another may
            refusals.append(error)
    if not found:
        raise refusals[0]
    everywhere = (under_each(e, by_profile, job.routing.name) for e in found)
    ranked = _best_of_each(lambda plan: plan.micro_batch_size, everywhere)
    return Result(job, ranked, None, len(found))


def under_each(estimate: Estimate, by_profile: dict[str, _Planners], own: str) -> Estimate:
    """Returns the estimate of a plan under the profile ``own``, with those under each profile."""
    plan, sharding = estimate.plan, estimate.job.sharding
    under = {name: planners[sharding].costs.estimate(plan) for name, planners in by_profile.items()}
    return replace(under[own], under=under)


def _by_profile(job: Job, space: Space, profiles: Iterable[RoutingProfile] | None) -> dict[str, _Planners]:
    others = {p.name: _planners(job.with_routing(p), space) for p in profiles or profiles_of(job) if p != job.routing}
    return {job.routing.name: _planners(job, space), **others}


def _planners(job: Job, space: Space) -> _Planners:
    layers = LayerCosts(job)
    return {
        sharding: Planner(replace(job, sharding=sharding), space, layers)
        for sharding in space.shardings or (job.sharding,)
    }


def _best_of_each(kind: Callable[[Plan], Hashable], estimates: Iterable[Estimate]) -> list[Estimate]:
    """Returns the best plan of each kind, the best first."""
    best: dict[Hashable, Estimate] = {}
    for estimate in estimates:
        mine = kind(estimate.plan)
        if mine not in best or _first(estimate) < _first(best[mine]):
            best[mine] = estimate
    return sorted(best.values(), key=_first)


def _first(estimate: Estimate) -> tuple[bool, float]:
    """Sorting key: plans that fit first, by their score; then others, by memory."""
    return not estimate.fits, estimate.score if estimate.fits else estimate.memory.total

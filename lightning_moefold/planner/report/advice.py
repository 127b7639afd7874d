# SPDX-License-Identifier: Apache-2.0
"""Advice beyond the ranking: which limit fails first, what would make a plan fit, and which settings cost speed."""

from __future__ import annotations

from dataclasses import replace
from math import lcm
from typing import Any

from lightning_moefold.errors import PlanError
from lightning_moefold.fold import Fold, divisors
from lightning_moefold.planner.cost.cost import Estimate
from lightning_moefold.planner.machine.hardware import PRESETS
from lightning_moefold.planner.report.explain import describe, gib
from lightning_moefold.planner.search.job import SHARDINGS, Job
from lightning_moefold.planner.search.robust import evaluate, search
from lightning_moefold.planner.search.search import Result
from lightning_moefold.planner.search.space import Space

_MOST_RANKS_TIMES = 64
#: A hint is given if it gains more than this factor.
_WORTH_SAYING = 1.05
#: Shortest sequence, in tokens, that is offered as advice.
_SHORTEST = 512


def why_not(result: Result, space: Space, fold: Fold | None = None) -> list[str]:
    """Says, for a job without a plan that fits, which limit fails first and what would make it fit.

    Args:
        result: Result of a search, or of the evaluation of one fold.
        space: The settings that could be chosen.
        fold: The requested fold, if one was requested.
    """
    smallest, job = result.best, result.job
    limit, memory = smallest.limit, smallest.memory
    part, size = max(memory.as_dict().items(), key=lambda item: item[1])
    what = (
        "No plan fits. The one that needs least memory" if fold is None else "This fold does not fit. Its smallest plan"
    )
    lines = [
        f"{what}, {describe(smallest)}, needs {gib(memory.total)} of the {gib(limit)} that a rank of {job.hardware.name} can "
        f"fill; most of it is {part} ({gib(size)}).",
    ]
    if fold is not None:
        best = _best_that_fits(job, space)
        if best is not None:
            another = f"Another fold fits: {describe(best)}, with {best.mfu:.1%} MFU and {gib(best.memory.total)}."
            return [*lines, another]
        lines.append("No other fold fits either.")
    return lines + ([f"It would fit {way}." for way in _ways_out(job, space)] or ["Nothing tried here makes it fit."])


def _ways_out(job: Job, space: Space) -> list[str]:
    """Returns the single changes that make a plan fit, cheapest first."""
    ways = []
    if "full" not in (space.shardings or (job.sharding,)) and _best_that_fits(job, replace(space, shardings=("full",))):
        ways.append("with --sharding full")
    for option, precision, masters in _narrower(job):
        if _best_that_fits(job, space, precision=precision, master_weights=masters):
            ways.append(f"with {option}")
            break
    if job.lora_rank is None and _best_that_fits(job, space, lora_rank=16, master_weights=False):
        ways.append("with --lora 16, which trains an adapter instead of the model")
    if job.lora_rank is not None and job.quantize is None and _best_that_fits(job, space, quantize="nf4"):
        ways.append("with --quantize nf4, which stores the frozen weights in 4 bits a number")
    larger = -(-job.global_batch_size // job.world_size) * job.world_size
    if larger > job.global_batch_size and _best_that_fits(job, space, global_batch_size=larger):
        ways.append(f"with --global-batch-size {larger}, which more folds divide")
    shorter = job.sequence_length // 2
    while shorter >= _SHORTEST and not _best_that_fits(job, space, sequence_length=shorter):
        shorter //= 2
    if shorter >= _SHORTEST:
        ways.append(f"with --sequence-length {shorter}")
    for name, machine in PRESETS.items():
        if machine.memory_bytes > job.hardware.memory_bytes and _best_that_fits(job, space, hardware=machine):
            ways.append(f"on {name} ({gib(machine.memory_bytes)} a rank)")
            break
    times = 2
    while times <= _MOST_RANKS_TIMES and not _best_that_fits(job, space, world_size=job.world_size * times):
        times *= 2
    if times <= _MOST_RANKS_TIMES:
        ways.append(f"on {job.world_size * times} ranks")
    return ways


def _narrower(job: Job) -> list[tuple[str, str, bool]]:
    """Returns the options that save memory by precision, each with the precision and whether masters are kept."""
    mixed = ("--precision bf16-mixed", "bf16-mixed", job.master_weights)
    if job.lora_rank is not None:  # an adapter stays in float32
        narrow = [("--precision bf16-true", "bf16-true", False)]
        return {"32-true": [mixed, *narrow], "bf16-mixed": narrow}.get(job.precision, [])
    masters = ("--precision bf16-true --master-weights", "bf16-true", True)
    true = ("--precision bf16-true, in which most updates are lost", "bf16-true", False)
    known = {"32-true": [mixed, masters, true], "bf16-mixed": [masters, true]}
    return known.get(job.precision, [true] if job.master_weights else [])


def _best_that_fits(job: Job, space: Space, **changes: Any) -> Estimate | None:
    """Returns the best plan of a changed job, or None if the job cannot be, or none of its plans fits."""
    try:
        changed = replace(job, **changes)
        best = search(changed, space, 1, [changed.routing]).best
    except PlanError:
        return None
    return best if best.fits else None


def _batch_hint(job: Job) -> list[str]:
    """Says which folds are excluded because dp must divide the batch."""
    out = [n for n in divisors(job.world_size) if job.global_batch_size % n and n < job.global_batch_size]
    if not out:
        return []
    sizes = ", ".join(map(str, out[:6])) + (", ..." if len(out) > 6 else "")
    step = out[-1] if len(out) == 1 else lcm(*out)
    larger = -(-job.global_batch_size // step) * step
    return [
        f"{job.global_batch_size} sequences do not divide over dp = {sizes}: folds with such a dp are left out; a batch of "
        f"{larger} would let them in."
    ]


def hints(result: Result, space: Space, fold: Fold | None = None) -> list[str]:
    """Says which settings of the job rule out a better plan (of ``fold``, if given)."""
    job, best = result.job, result.best
    lines = _batch_hint(job) if fold is None else _same_fold(result, space, fold)
    if job.precision == "fp8-mixed":
        lines.append("fp8-mixed is planned only: the strategy does not run it.")
    if job.precision == "bf16-true" and not job.master_weights and job.lora_rank is None:
        lines.append(
            "With bf16-true most updates are smaller than the spacing of bfloat16 numbers and are lost: add --master-weights "
            "(docs/training.md), or use bf16-mixed."
        )
    if broken := [name for name, e in best.under.items() if not e.fits]:
        slower = ", and plans that would are much slower on average; --routing NAME ranks for such routing alone"
        lines.append(f"This plan does not fit if routing becomes {' or '.join(broken)}{'' if fold else slower}.")
    if best.plan.offload != "none":
        ranks = min(job.world_size, job.hardware.gpus_per_node)
        lines.append(
            ("Without offloading no plan fits. " if space.offloads is None else "")
            + f"Offloading takes {gib(best.memory.host)} of host memory a rank, {gib(best.memory.host * ranks)} a node if all "
            "are as full as the fullest. Its time is computed from the link's bandwidth; it was not measured on GPUs."
        )
    elif space.offloads is None and best.plan.recompute != "none" and job.hardware.device != "cpu":
        lines.append("This plan recomputes to save memory; --offload any tries host memory, too.")
    if best.load > 1.2 and job.capacity_factor is None:
        lines.append(
            f"The busiest expert-parallel rank computes {best.load:.2f} times the mean: experts placed by load, "
            "an auxiliary loss, or a capacity factor would bring that down."
        )
    if best.overhead == "bubble" and best.times.get("bubble", 0) > 0.1 * best.step_time:
        lines.append(
            f"The pipeline waits {best.times['bubble'] / best.step_time:.0%} of the time with {best.microbatches} "
            "micro-batches; a larger global batch would fill it."
        )
    return lines


def _same_fold(result: Result, space: Space, fold: Fold) -> list[str]:
    """Says which settings that were not given make a fold faster."""
    job, best = result.job, result.best
    sharding = tuple(s for s in SHARDINGS if s != "none") if not space.shardings else space.shardings
    wide = replace(space, shardings=sharding, dispatchers=job.dispatchers, micro_batch_sizes=None)
    try:
        other = evaluate(job, fold, wide, [job.routing]).best
    except PlanError:
        return []
    if not other.fits or other.step_time * _WORTH_SAYING > best.step_time:
        return []
    return [f"The same fold is faster as {describe(other)}: {other.mfu:.1%} MFU instead of {best.mfu:.1%}."]

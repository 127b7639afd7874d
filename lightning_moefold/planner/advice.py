# SPDX-License-Identifier: Apache-2.0
"""What to tell a person beyond the ranking: what fails first, what would make it fit, what is left on the table."""

from __future__ import annotations

from dataclasses import replace

from lightning_moefold.fold import Fold
from lightning_moefold.planner.hardware import PRESETS
from lightning_moefold.planner.job import Job, PlanError
from lightning_moefold.planner.search import Planner, Result, Space

_MOST_RANKS_TIMES = 64
#: A hint is given for a gain above this.
_WORTH_SAYING = 1.05


def why_not(result: Result, space: Space) -> list[str]:
    """For a job of which no plan fits: the limit that fails first, and what would make it fit."""
    smallest, job = result.best, result.job
    limit, memory = smallest.limit, smallest.memory
    part, size = max(memory.as_dict().items(), key=lambda item: item[1])
    lines = [
        f"No plan fits. The one that needs least memory, {smallest.plan}, needs {_gb(memory.total)} of the "
        f"{_gb(limit)} that a rank of {job.hardware.name} can fill; most of it is {part} ({_gb(size)}).",
    ]
    lines += [f"It would fit {way}." for way in _ways_out(job, space)] or ["Nothing tried here makes it fit."]
    return lines


def _ways_out(job: Job, space: Space) -> list[str]:
    ways = []
    if job.sharding != "full" and _fits(replace(job, sharding="full"), space):
        ways.append("with --sharding full")
    for name, machine in PRESETS.items():
        if machine.memory_bytes > job.hardware.memory_bytes and _fits(replace(job, hardware=machine), space):
            ways.append(f"on {name} ({_gb(machine.memory_bytes)} a rank)")
            break
    times = 2
    while times <= _MOST_RANKS_TIMES:
        larger = replace(job, world_size=job.world_size * times)
        larger = replace(larger, global_batch_size=max(job.global_batch_size, 1))
        if _fits(larger, space):
            ways.append(f"on {larger.world_size} ranks")
            break
        times *= 2
    if job.precision in ("32-true", "64-true") and _fits(replace(job, precision="bf16-mixed"), space):
        ways.append("with --precision bf16-mixed")
    return ways


def _fits(job: Job, space: Space) -> bool:
    try:
        return Planner(job, space).search(keep=1).best.fits
    except PlanError:
        return False


def hints(result: Result, space: Space, fold: Fold | None = None) -> list[str]:
    """What a better plan would need, where the job's own settings stand in its way; of ``fold`` if one is given."""
    job, best = result.job, result.best
    lines = []
    if job.sharding == "full" and space.micro_batch_sizes is None:
        planner = Planner(job, space.free)
        free = planner.evaluate(fold)[0] if fold else planner.search(keep=1).best
        if free.fits and free.mfu > best.mfu * _WORTH_SAYING:
            lines.append(
                "Full sharding gathers weights for every micro-batch, here one sequence. With --micro-batch-size any "
                f"the best plan is {free.plan}: {free.mfu:.1%} MFU instead of {best.mfu:.1%}."
            )
        planner = Planner(replace(job, sharding="optimizer"), space)
        sharded = planner.evaluate(fold)[0] if fold else planner.search(keep=1).best
        if sharded.fits and sharded.mfu > max(best.mfu, free.mfu) * _WORTH_SAYING:
            lines.append(f"With --sharding optimizer the best plan is {sharded.plan}: {sharded.mfu:.1%} MFU.")
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


def _gb(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"

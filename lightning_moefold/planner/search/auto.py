# SPDX-License-Identifier: Apache-2.0
"""``fold="auto"``: the fold for the ranks at hand, with the reason in a sentence."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lightning_moefold.errors import HardwareError, PlanError
from lightning_moefold.fold import divisors
from lightning_moefold.planner.cost.cost import Estimate
from lightning_moefold.planner.machine.devices import find_device
from lightning_moefold.planner.machine.hardware import PRESETS, Hardware
from lightning_moefold.planner.report.advice import why_not
from lightning_moefold.planner.report.explain import plan_json
from lightning_moefold.planner.search.job import Job
from lightning_moefold.planner.search.search import Planner, Result, Space


@dataclass(frozen=True)
class AutoFold:
    """What ``fold="auto"`` is to plan for, where the strategy cannot see it for itself.

    Args:
        model: A known model, or a directory with a ``config.json``; that of the LightningModule if not given.
        global_batch_size: Rows of a batch over all data ranks together; read from the data module's attribute of that
            name if not given.
        batch_size: Instead of it, rows of a batch on each data rank, as a ``DataLoader`` has them; read from a
            ``DataLoader`` given to ``fit`` if not given.
        sequence_length: Tokens of a row; read from the data module's attribute of that name, or from the first row.
        hardware: A preset or TOML file of the planner; that of the devices at hand if not given.
        routing: ``"balanced"``, ``"mild"``, ``"skewed"``, or a recorded trace.
    """

    model: str | None = None
    global_batch_size: int | None = None
    batch_size: int | None = None
    sequence_length: int | None = None
    hardware: str | None = None
    routing: str = "balanced"

    def __post_init__(self) -> None:
        for name in ("global_batch_size", "batch_size", "sequence_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PlanError(f"{name}={value} of AutoFold must be at least 1.")
        if self.global_batch_size is not None and self.batch_size is not None:
            raise PlanError(
                "AutoFold takes global_batch_size (of all data ranks together) or batch_size (of each), not both."
            )


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Args:
        estimate: The plan and its prediction.
        reason: A sentence for the log.
        record: Plain values to store with a checkpoint.
    """

    estimate: Estimate
    reason: str
    record: dict[str, Any]


def choose(job: Job, space: Space | None = None, rows_per_rank: int | None = None) -> Choice:
    """The best fold of a job.

    Args:
        job: Model, ranks, machine and batch.
        space: What may be chosen; a strategy passes what it can run.
        rows_per_rank: Rows of the batch on each data rank where those are fixed, and not those of the job together; the
            plan with most tokens per second is then the best.

    Raises:
        PlanError: If nothing fits; the message says what would help.
    """
    results = _searches(job, space or Space(), rows_per_rank)
    best_first = sorted(results, key=_merit)
    best, job = best_first[0].best, best_first[0].job
    if not best.fits:
        raise PlanError(" ".join(why_not(best_first[0], space or Space())))
    others = [(e, _speed(r.job, e)) for r in results for e in r.plans if e.fits and e.plan.fold != best.plan.fold]
    reason = (
        f'fold="auto" chose {best.plan}: {_seconds(best.step_time)} per step and {best.mfu:.1%} MFU predicted on '
        f"{job.world_size} x {job.hardware.name}, {best.memory.total / 2**30:.1f} of {best.limit / 2**30:.1f} GiB, "
        f"bound by {best.bound_by}"
    )
    if others:
        second, speed = max(others, key=lambda other: other[1])
        reason += f"; next is {second.plan.fold}, {_speed(job, best) / speed - 1:.1%} slower"
    return Choice(best, reason + ".", plan_json(job, best))


def _searches(job: Job, space: Space, rows_per_rank: int | None) -> list[Result]:
    if rows_per_rank is None:
        return [Planner(job, space).search(keep=2)]
    results, refusals = [], []
    for dp in divisors(job.world_size):
        try:
            mine = replace(job, global_batch_size=rows_per_rank * dp)
            results.append(Planner(mine, replace(space, data_parallel_size=dp)).search(keep=2))
        except PlanError as error:  # no fold has this dp
            refusals.append(error)
    if not results:
        raise refusals[0]
    return results


def _merit(result: Result) -> tuple[bool, float]:
    """Sorting key: what fits by speed, what does not by memory."""
    best = result.best
    return not best.fits, -_speed(result.job, best) if best.fits else best.memory.total


def _speed(job: Job, estimate: Estimate) -> float:
    """Rows per second."""
    return job.global_batch_size / estimate.step_time


def _seconds(value: float) -> str:
    return f"{value:.3f} s" if value >= 0.1 else f"{value * 1e3:.1f} ms"


def machine_for(device_name: str | None, ranks_per_node: int, memory_bytes: float | None = None) -> Hardware:
    """The preset for an accelerator, by its name, on nodes of ``ranks_per_node``.

    Args:
        device_name: As the driver gives it, such as ``"NVIDIA H100 80GB HBM3"``; None for CPU ranks.
        ranks_per_node: Ranks that share a node.
        memory_bytes: Of the device, where it is known to differ.

    Raises:
        PlanError: For a device of which no preset speaks.
    """
    try:
        preset = PRESETS["cpu"] if device_name is None else find_device(device_name)
    except HardwareError as error:
        raise PlanError(str(error)) from None
    machine = replace(preset, gpus_per_node=ranks_per_node)
    return machine if memory_bytes is None else replace(machine, memory_bytes=memory_bytes)

# SPDX-License-Identifier: Apache-2.0
"""``fold="auto"``: chooses the fold for the available ranks, and says why in one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_moefold.errors import HardwareError, PlanError
from lightning_moefold.fold import divisors
from lightning_moefold.planner.cost.cost import Estimate
from lightning_moefold.planner.cost.routing import RoutingProfile
from lightning_moefold.planner.machine.devices import find_device
from lightning_moefold.planner.machine.hardware import PRESETS, Hardware
from lightning_moefold.planner.report.advice import why_not
from lightning_moefold.planner.report.explain import plan_json
from lightning_moefold.planner.search.job import Job
from lightning_moefold.planner.search.robust import search
from lightning_moefold.planner.search.search import Result
from lightning_moefold.planner.search.space import Space


@dataclass(frozen=True)
class AutoFold:
    """Describes the job for ``fold="auto"``, where the strategy cannot find it out itself.

    Args:
        model: A known model, or a directory with a ``config.json``. By default the model of the LightningModule.
        global_batch_size: Rows of a batch over all data ranks together. By default the data module's attribute of that
            name.
        batch_size: Rows of a batch on each data rank, as in a ``DataLoader``; replaces ``global_batch_size``. By
            default that of the ``DataLoader`` given to ``fit``.
        sequence_length: Tokens of a row. By default the data module's attribute of that name, or the length of the
            first row.
        hardware: A preset or TOML file of the planner. By default the preset of the available devices.
        routing: ``"balanced"``, ``"mild"``, ``"skewed"``, or a recorded trace. By default plans are ranked by all three
            profiles.
    """

    model: str | None = None
    global_batch_size: int | None = None
    batch_size: int | None = None
    sequence_length: int | None = None
    hardware: str | None = None
    routing: str | None = None

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
    """The chosen plan.

    Args:
        estimate: The plan with its predicted time and memory.
        reason: The choice and its reason, as a sentence for the log.
        record: The choice as plain values, to be stored in checkpoints.
    """

    estimate: Estimate
    reason: str
    record: dict[str, Any]


def choose(
    job: Job,
    space: Space | None = None,
    rows_per_rank: int | None = None,
    profiles: Sequence[RoutingProfile] | None = None,
) -> Choice:
    """Chooses the best fold of a job.

    Args:
        job: The training job: model, ranks, machine and batch.
        space: The settings that may be chosen; a strategy passes those that it can run.
        rows_per_rank: Rows of the batch on each data rank, if these are fixed instead of the job's global batch. The
            best plan is then the one with the most tokens per second.
        profiles: Routing profiles by which plans are ranked (:func:`~.robust.search`).

    Raises:
        PlanError: If no plan fits; the message says what would help.
    """
    space = space or Space()
    results = _searches(job, space, rows_per_rank, profiles)
    first = min(results, key=_merit)
    best, job = first.best, first.job
    if not best.fits:
        raise PlanError(" ".join(why_not(first, space)))
    others = [(e, _speed(e)) for r in results for e in r.plans if e.fits and e.plan.fold != best.plan.fold]
    reason = (
        f'fold="auto" chose {best.plan}: {_seconds(best.step_time)} per step and {best.mfu:.1%} MFU predicted on '
        f"{job.world_size} x {job.hardware.name}, {best.memory.total / 2**30:.1f} of {best.limit / 2**30:.1f} GiB, "
        f"bound by {best.bound_by}"
    )
    if others:
        second, speed = max(others, key=lambda other: other[1])
        reason += f"; next is {second.plan.fold}, {_speed(best) / speed - 1:.1%} slower"
        reason += " on average over balanced, mild and skewed routing" * (len(best.under) > 1)
    return Choice(best, reason + ".", plan_json(best))


def _searches(
    job: Job, space: Space, rows_per_rank: int | None, profiles: Sequence[RoutingProfile] | None
) -> list[Result]:
    if rows_per_rank is None:
        return [search(job, space, 2, profiles)]
    results, refusals = [], []
    for dp in divisors(job.world_size):
        try:
            mine = replace(job, global_batch_size=rows_per_rank * dp)
            results.append(search(mine, replace(space, data_parallel_size=dp), 2, profiles))
        except PlanError as error:  # there is no fold with this dp
            refusals.append(error)
    if not results:
        raise refusals[0]
    return results


def _merit(result: Result) -> tuple[bool, float]:
    """Sorting key: plans that fit by speed, others by memory."""
    best = result.best
    return not best.fits, -_speed(best) if best.fits else best.memory.total


def _speed(estimate: Estimate) -> float:
    """Rows per second, over the routing profiles by which plans are ranked."""
    return estimate.job.global_batch_size / estimate.score


def _seconds(value: float) -> str:
    return f"{value:.3f} s" if value >= 0.1 else f"{value * 1e3:.1f} ms"


def machine_for(device_name: str | None, ranks_per_node: int, memory_bytes: float | None = None) -> Hardware:
    """Returns the preset of a device by its name, on nodes of ``ranks_per_node`` ranks.

    Args:
        device_name: Name given by the driver, such as ``"NVIDIA H100 80GB HBM3"``; None for CPU ranks.
        ranks_per_node: Number of ranks in a node.
        memory_bytes: Memory of the device in bytes, if it differs from the preset's.

    Raises:
        PlanError: If no preset describes the device.
    """
    try:
        preset = PRESETS["cpu"] if device_name is None else find_device(device_name)
    except HardwareError as error:
        raise PlanError(str(error)) from None
    machine = replace(preset, gpus_per_node=ranks_per_node)
    return machine if memory_bytes is None else replace(machine, memory_bytes=memory_bytes)

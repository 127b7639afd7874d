# SPDX-License-Identifier: Apache-2.0
"""``fold="auto"``: the fold for the ranks at hand, with the reason in a sentence."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lightning_moefold.planner.advice import why_not
from lightning_moefold.planner.cost import Estimate
from lightning_moefold.planner.explain import plan_json
from lightning_moefold.planner.hardware import PRESETS, Hardware
from lightning_moefold.planner.job import Job, PlanError
from lightning_moefold.planner.search import Planner, Space

#: Part of a device's name, and the preset that describes it.
_DEVICES = (("H100", "dgx-h100"), ("H200", "dgx-h200"), ("H800", "dgx-h100"), ("A100", "a100"), ("B200", "b200"))


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


def choose(job: Job, space: Space | None = None) -> Choice:
    """The best fold of a job.

    Args:
        job: Model, ranks, machine and batch.
        space: What may be chosen; a strategy passes what it can run.

    Raises:
        PlanError: If nothing fits; the message says what would help.
    """
    space = space or Space()
    result = Planner(job, space).search(keep=2)
    best = result.best
    if not best.fits:
        raise PlanError(" ".join(why_not(result, space)))
    reason = (
        f'fold="auto" chose {best.plan}: {best.step_time:.3f} s per step and {best.mfu:.1%} MFU predicted on '
        f"{job.world_size} x {job.hardware.name}, {best.memory.total / 2**30:.1f} of {best.limit / 2**30:.1f} GiB, "
        f"bound by {best.bound_by}"
    )
    second = next((e for e in result.plans if e.plan.fold != best.plan.fold), None)
    if second is not None:
        reason += f"; next is {second.plan.fold}, {second.step_time / best.step_time - 1:.1%} slower"
    return Choice(best, reason + ".", plan_json(job, best))


def machine_for(device_name: str | None, ranks_per_node: int, memory_bytes: float | None = None) -> Hardware:
    """The preset for an accelerator, by its name, on nodes of ``ranks_per_node``.

    Args:
        device_name: As the driver gives it, such as ``"NVIDIA H100 80GB HBM3"``; None for CPU ranks.
        ranks_per_node: Ranks that share a node.
        memory_bytes: Of the device, where it is known to differ.
    """
    name = "cpu"
    if device_name is not None:
        name = next((preset for part, preset in _DEVICES if part in device_name.upper()), "dgx-h100")
    machine = replace(PRESETS[name], gpus_per_node=ranks_per_node)
    return machine if memory_bytes is None else replace(machine, memory_bytes=memory_bytes)

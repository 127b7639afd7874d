# SPDX-License-Identifier: Apache-2.0
"""Compares the memory of a rehearsed rank with the planner's prediction.

Legend: as in :mod:`.planner.cost.memory`.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_moefold.fold import Fold
from lightning_moefold.modules.recompute_parts import recompute_text
from lightning_moefold.planner.cost.layer import LayerCosts
from lightning_moefold.planner.cost.memory import Memory, MemoryModel
from lightning_moefold.planner.cost.schedules import pipeline_layout
from lightning_moefold.planner.machine.hardware import find_hardware
from lightning_moefold.planner.search.job import Job, Plan
from lightning_moefold.testing.rehearsal.messages import Expected
from lightning_moefold.testing.rehearsal.scale import Rehearsal, Step


def planned(step: Step, fold: Fold, rank: int) -> Memory:
    """Returns the planner's bytes for the pipeline rank of ``rank``, on a machine without GPUs like the rehearsal."""
    config, chunks, m = step.config, step.plan.chunks, step.num_microbatches
    job = Job(config, fold.world_size, find_hardware("cpu"), fold.dp * m, step.sequence_length)
    # Without a pipeline, all rows pass through the layers at once.
    plan = Plan(fold, 1 if fold.pp > 1 else m, step.plan.schedule, chunks, recompute_text(step.recompute))
    stage = fold.coordinates(rank)["pp"]
    layers = pipeline_layout(config, fold.pp, chunks, step.plan.schedule)[stage]
    return MemoryModel(LayerCosts(job)).on_rank(plan, stage, layers)


def held(done: Rehearsal, expected: Sequence[Expected]) -> tuple[float, float, float, float]:
    """Returns bytes of weights with gathered weights, of whole gradients, of moments, and of the rest, as rehearsed.

    Gathered and scattered tensors include padding. The rest is what existed at the peak besides weights and gradients.

    Args:
        done: The rehearsal of a rank.
        expected: The expected collectives with their purposes; all weights are gathered once, as with sharding
            ``"optimizer"``.
    """
    gathered, whole = (
        sum(e.message.bytes * e.count for e in expected if e.purpose.startswith(what))
        for what in ("weights of", "gradients of")
    )
    weights, gradients = done.memory["weights"] + gathered, whole or done.memory["gradients"]
    return weights, gradients, done.memory["state"], done.peak - weights - gradients

# SPDX-License-Identifier: Apache-2.0
"""What a rehearsed rank holds beside what the planner says it does.

Legend: as in :mod:`.planner.cost.memory`.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_moefold.fold import Fold
from lightning_moefold.planner.cost.layer import LayerCosts
from lightning_moefold.planner.cost.memory import Memory, MemoryModel
from lightning_moefold.planner.cost.schedules import pipeline_layout
from lightning_moefold.planner.machine.hardware import find_hardware
from lightning_moefold.planner.search.job import Job, Plan
from lightning_moefold.testing.rehearsal.messages import Expected
from lightning_moefold.testing.rehearsal.scale import Rehearsal, Step


def planned(step: Step, fold: Fold, rank: int) -> Memory:
    """The planner's bytes for the pipeline rank of ``rank``, on a machine without GPUs, as a rehearsal is."""
    config, chunks, m = step.config, step.plan.chunks, step.num_microbatches
    job = Job(config, fold.world_size, find_hardware("cpu"), fold.dp * m, step.sequence_length)
    # Without a pipeline all rows go through the layers at once.
    plan = Plan(fold, 1 if fold.pp > 1 else m, step.plan.schedule, chunks, step.recompute or "none")
    stage = fold.coordinates(rank)["pp"]
    layers = pipeline_layout(config, fold.pp, chunks, step.plan.schedule)[stage]
    return MemoryModel(LayerCosts(job)).on_rank(plan, stage, layers)


def held(done: Rehearsal, expected: Sequence[Expected]) -> tuple[float, float, float, float]:
    """Bytes of weights with gathered ones, of whole gradients, and of moments, as built and sent; and the rest.

    What is gathered and scattered is padded. The rest is what lived at the peak beside weights and gradients.

    Args:
        done: What a rank has done.
        expected: What it had to send, with purposes; all weights gathered once, as with sharding ``"optimizer"``.
    """
    gathered, whole = (
        sum(e.message.bytes * e.count for e in expected if e.purpose.startswith(what))
        for what in ("weights of", "gradients of")
    )
    weights, gradients = done.memory["weights"] + gathered, whole or done.memory["gradients"]
    return weights, gradients, done.memory["state"], done.peak - weights - gradients

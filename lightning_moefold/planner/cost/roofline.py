# SPDX-License-Identifier: Apache-2.0
"""Points of a plan's MoE layers in the DDL roofline of FasterMoE (PPoPP 2022). Pure Python."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

from lightning_moefold.planner.cost.cost import Estimate
from lightning_moefold.planner.cost.layer import LayerCosts
from lightning_moefold.planner.search.job import Job


@dataclass(frozen=True)
class RooflinePoint:
    """A MoE layer on its busiest rank, forward and backward.

    Args:
        layer: Index of the layer in the routing profile.
        load: Rows on the busiest rank divided by the mean.
        ratio: Seconds of the experts' products divided by seconds of their exchange; None without an exchange.
        achieved: FLOP/s of the balanced experts over the dense peak, exchange included.
    """

    layer: int
    load: float
    ratio: float | None
    achieved: float


def roofline(job: Job, estimate: Estimate) -> list[RooflinePoint]:
    """Returns one point per layer of the routing profile; a single point if routing is balanced, since all layers are equal."""
    plan, fold, model = estimate.plan, estimate.plan.fold, job.model
    tokens = ceil(LayerCosts(job).tokens(plan.micro_batch_size, fold.cp) / fold.tp)
    flops = 3 * 2 * 3 * tokens * model.num_experts_per_tok * model.hidden_size * model.moe_intermediate_size * job.kept
    points = []
    for layer, shares in enumerate(job.routing.expert_shares(model.num_experts, model.num_experts_per_tok)):
        alone = replace(job.routing, shares=(tuple(float(share) for share in shares),))
        costs = LayerCosts(job.with_routing(alone))
        block = costs.experts(fold.ep, fold.etp, tokens, plan.dispatcher, fold.tp * fold.cp)
        busy = sum(part["experts"] for part in (block.forward, block.backward))
        talk = sum(part.get(kind, 0.0) for part in (block.forward, block.backward) for kind in ("a2a", "etp"))
        achieved = flops / (busy + talk) / job.hardware.peak(job.dtype)
        points.append(
            RooflinePoint(layer, costs.load(fold.ep, fold.tp * fold.cp), busy / talk if talk else None, achieved)
        )
    return points

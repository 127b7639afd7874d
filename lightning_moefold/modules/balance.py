# SPDX-License-Identifier: Apache-2.0
"""The load-balancing loss of MoE layers in networks of the user's own, and losses of all ranks' data in general.

    loss of a layer = E * sum_e f_e * P_e

with ``f_e`` the choices of expert e and ``P_e`` its summed probability, each divided by the tokens of all ranks (Switch
Transformer, arXiv 2101.03961, equation 4, for top-k). The balanced value is top-k.

Legend: E experts, M micro-batches (one here).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_moefold import comm
from lightning_moefold.mesh import FoldedMesh
from lightning_moefold.modules.sequence import RoutingStatistics


@dataclass
class Routing:
    """What a layer keeps of its latest forward pass.

    Args:
        statistics: Of this rank's tokens.
        top_k: Experts per token.
        mesh: The folded mesh; None on one rank.
    """

    statistics: RoutingStatistics
    top_k: int
    mesh: FoldedMesh | None


def load_balancing_loss(network: nn.Module) -> Tensor:
    """Mean load-balancing loss of the MoE layers in a network, over the tokens of all ranks.

    To be called after a forward pass in training, and added to the loss with a coefficient. One collective: every rank
    calls it. Its value is the same on every rank, and its gradient that of this global value.

    Args:
        network: Holds layers made with ``keep_routing=True``, each called since the last optimizer step.

    Returns:
        A scalar, in at least float32.

    Raises:
        ValueError: If no layer keeps its routing, or none was called in training.
    """
    for module in network.modules():
        run = module.__dict__.get("_moefold_runner")
        if run is not None and (spread := run.load_balancing_loss()) is not None:
            return spread  # over pipeline stages
    routings = [r for m in network.modules() if isinstance(r := getattr(m, "routing", None), Routing)]
    if not routings:
        raise ValueError(
            "no MoE layer has kept its routing; make layers with keep_routing=True and run the network in training mode first."
        )
    mesh = routings[0].mesh
    mine = [
        torch.stack([r.statistics.counts_ME.double(), r.statistics.probability_ME.detach().double()]) for r in routings
    ]
    totals = torch.cat([part.flatten() for part in mine])
    if mesh is not None:
        comm.all_reduce_raw(totals, mesh.stage)
    value, share = (
        totals.new_zeros(()),
        torch.zeros((), dtype=routings[0].statistics.probability_ME.dtype, device=totals.device),
    )
    for routing, total in zip(routings, totals.split([part.numel() for part in mine]), strict=True):
        counts_E, probability_E = total.view(2, -1).unbind(0)
        tokens = (counts_E.sum() / routing.top_k).clamp(min=1)
        slope_E = counts_E / tokens.square() * (len(counts_E) / len(routings))
        value = value + (slope_E * probability_E).sum()
        share = share + (slope_E.to(share.dtype) * routing.statistics.probability_ME[0]).sum()
    return global_value(share, value, mesh)


class _GlobalValue(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, share: Tensor, value: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return value.to(share.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] * ctx.scale, None, None


def global_value(share: Tensor, value: Tensor, mesh: FoldedMesh | None, copies: int = 1) -> Tensor:
    """A loss with the value for all ranks' data and the gradient of this rank's share of it.

    A loss that ``training_step`` returns means the average over data ranks, whose gradients are summed: the strategy
    multiplies it by 1 / (dp * cp). This one is the global value already, so its backward undoes that.

    Args:
        share: The part of the value that depends on this rank's data; scalar.
        value: The sum of all shares.
        mesh: The folded mesh; None on one rank.
        copies: How many of these ranks have computed the same share (of a group that shares its rows).
    """
    return _GlobalValue.apply(share, value, 1.0 if mesh is None else mesh.dp_cp.size / copies)

# SPDX-License-Identifier: Apache-2.0
"""Losses of routers in custom networks, and losses over all ranks' data in general.

The load-balancing loss (:func:`~.routers.statistics.balance_slope`) and the z-loss (the mean of
``logsumexp(logits)^2``; ST-MoE, arXiv 2202.08906, equation 5) are means over the MoE layers of a network and over the
tokens of all ranks.

Legend: E experts, L layers, S rows of a layer's routing table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_moefold import comm
from lightning_moefold.errors import InputError
from lightning_moefold.mesh import FoldedMesh
from lightning_moefold.modules.routers.statistics import balance_slope, split_table


@dataclass
class Routing:
    """The routing statistics that a layer keeps of its latest forward pass.

    Args:
        table_SE: Statistics of this rank's tokens (:mod:`.routers.statistics`).
        top_k: Number of experts per token.
        mesh: The folded mesh; None on one rank.
        dtype: Data type of the probabilities.
    """

    table_SE: Tensor
    top_k: int
    mesh: FoldedMesh | None
    dtype: torch.dtype


def load_balancing_loss(network: nn.Module) -> Tensor:
    """Computes the mean load-balancing loss of the MoE layers in a network, over the tokens of all ranks.

    Call it after a forward pass in training mode and add it to the loss with a coefficient. It makes one collective, so
    every rank must call it. Its value is the same on every rank, and its gradient is that of this global value.

    Args:
        network: Network with layers made with ``keep_routing=True``, each called since the last optimizer step.

    Returns:
        A scalar, in at least float32.

    Raises:
        ValueError: If no layer keeps its routing, or none was called in training.
    """
    for module in network.modules():
        run = module.__dict__.get("_moefold_runner")
        if run is not None and (spread := run.load_balancing_loss()) is not None:
            return spread  # the layers are spread over pipeline stages
    return _mean_loss(network, _balance)


def router_z_loss(network: nn.Module) -> Tensor:
    """Computes the mean z-loss of a network's MoE layers, over the tokens of all ranks. Use it like :func:`load_balancing_loss`.

    Args:
        network: As for :func:`load_balancing_loss`.

    Returns:
        A scalar, in at least float32.

    Raises:
        ValueError: As for :func:`load_balancing_loss`.
    """
    return _mean_loss(network, _z)


def _balance(table_SE: Tensor, counts_GE: Tensor, top_k: int) -> Tensor:
    return (balance_slope(counts_GE, top_k) * split_table(table_SE)[1]).sum()


def _z(table_SE: Tensor, counts_GE: Tensor, top_k: int) -> Tensor:
    return split_table(table_SE)[2] / (counts_GE.sum() / top_k).clamp(min=1)


def _mean_loss(network: nn.Module, loss: Callable[[Tensor, Tensor, int], Tensor]) -> Tensor:
    """Returns the mean of a loss over layers; ``loss`` is linear in the table, and also gets the choices of all ranks."""
    routings, totals = _reduced(network)
    counts = [split_table(total_SE)[0] for total_SE in totals]
    shares, values = (
        torch.stack([loss(t, n, r.top_k) for t, n, r in zip(tables, counts, routings, strict=True)]).mean()
        for tables in ([routing.table_SE for routing in routings], totals)
    )
    return global_value(shares.to(routings[0].dtype), values, routings[0].mesh)


def _reduced(network: nn.Module) -> tuple[list[Routing], list[Tensor]]:
    """Returns the routing that the layers have kept, and their tables summed over all ranks. Collective."""
    routings = [r for m in network.modules() if isinstance(r := getattr(m, "routing", None), Routing)]
    if not routings:
        raise InputError(
            "no MoE layer has kept its routing; make layers with keep_routing=True and run the network in training mode first."
        )
    mesh, tables = routings[0].mesh, [r.table_SE.detach() for r in routings]
    totals = torch.cat([table.flatten() for table in tables])
    if mesh is not None:
        comm.all_reduce_raw(totals, mesh.stage)
    parts = totals.split([table.numel() for table in tables])
    return routings, [part.view_as(table) for part, table in zip(parts, tables, strict=True)]


def global_value(
    share: Tensor, value: Tensor, mesh: FoldedMesh | None, copies: int = 1, factor: Tensor | float = 1.0
) -> Tensor:
    """Returns a loss that has the value for all ranks' data and the gradient of this rank's share.

    Gradients are summed over data ranks. So that the loss returned by ``training_step`` means the average over data
    ranks, the strategy multiplies it by 1 / (dp * cp). This loss is a global value already, so its backward undoes the
    factor.

    Args:
        share: The part of the value that depends on this rank's data, a scalar.
        value: The sum of all shares.
        mesh: The folded mesh; None on one rank.
        copies: Number of ranks that have computed the same share, because they share rows.
        factor: Factor of the gradient.
    """
    scale = factor * (1.0 if mesh is None else mesh.dp_cp.size / copies)
    return comm.linear(share, lambda share: value.to(share.dtype, copy=True), lambda grad: grad * scale)

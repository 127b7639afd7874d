# SPDX-License-Identifier: Apache-2.0
"""Load balance without an auxiliary loss: the bias of each expert follows its load (arXiv 2408.15664, DeepSeek-V3)."""

from __future__ import annotations

import torch
from torch import nn

from lightning_moefold import comm
from lightning_moefold.modules.routers.router import Router


def update_expert_bias(network: nn.Module) -> None:
    """Moves the biases of all routers in ``network`` according to the choices of all ranks since the last call.

    The strategy calls this after each optimizer step; call it there in your own training loop. It makes one collective
    of integers over the ranks of a pipeline stage, so the biases are bit-identical under every fold.

    Args:
        network: Network with routers that have a ``bias_update_rate``; if there are none, nothing happens.
    """
    routers = [m for m in network.modules() if isinstance(m, Router) and m.learns_bias]
    if not routers:
        return
    counts = torch.cat([router.counts_E for router in routers])
    mesh = routers[0].mesh
    if mesh is not None:
        comm.all_reduce_raw(counts, mesh.stage)
    for router, counts_E in zip(routers, counts.split([r.num_experts for r in routers]), strict=True):
        router.update_bias(counts_E)

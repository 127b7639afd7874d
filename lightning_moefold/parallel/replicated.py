# SPDX-License-Identifier: Apache-2.0
"""What a LightningModule holds beside the models: replicated on every rank, kept alike as under DDP."""

from __future__ import annotations

import torch
from torch import nn
from torchmetrics import Metric

from lightning_moefold import comm
from lightning_moefold.errors import InputError
from lightning_moefold.mesh import FoldedMesh
from lightning_moefold.models import MoECausalLM
from lightning_moefold.modules.base import parallel_roots
from lightning_moefold.parallel.network.protocol import layered_networks
from lightning_moefold.parallel.network.runner import network_runners, runner_of
from lightning_moefold.parallel.parameters import ParameterRegistry
from lightning_moefold.parallel.randomness import Randomness


class ReplicatedModules:
    """The user's own parameters, buffers and metrics in a LightningModule.

    Attributes:
        buffers_stale: Whether a step may have changed buffers (running statistics) since they were last made alike.
    """

    def __init__(self, root: nn.Module, registry: ParameterRegistry, mesh: FoldedMesh) -> None:
        self.mesh, self.buffers_stale = mesh, True
        ours = {id(b) for _, part in parallel_roots(root) for b in part.buffers()}
        staged = [r.network.module for _, r in network_runners(root) if r.pipeline is not None]
        # Stages hold different buffers: those are alike on the ranks of each.
        self._of_stage = [b for network in staged for b in network.buffers() if id(b) not in ours]
        self._root, self._ours = root, ours | {id(b) for b in self._of_stage}
        self._parameters = [p.detach() for _, p in registry.own()]

    def prepare(self) -> None:
        """Parameters and buffers start out as rank 0's. Collective."""
        comm.broadcast_flat(self._parameters, self.mesh.world)
        self.synchronize_buffers()
        self._confine_metrics()

    def synchronize_buffers(self) -> None:
        """Before a step whose predecessor may have changed them, buffers are rank 0's again. Collective."""
        if self.buffers_stale:
            comm.broadcast_flat([b.detach() for b in self._root.buffers() if id(b) not in self._ours], self.mesh.world)
            comm.broadcast_flat([b.detach() for b in self._of_stage], self.mesh.stage)
        self.buffers_stale = False

    def _confine_metrics(self) -> None:
        """Metrics of torchmetrics reduce over the world by default, which would count the ranks of a tp group each."""
        axis = self.mesh.axis("dp")
        for metric in (m for m in self._root.modules() if isinstance(m, Metric)):
            if metric.process_group is None and axis.size < self.mesh.world.size:
                metric.process_group = axis.group
                if axis.size == 1:
                    metric.distributed_available_fn = _never


def align_blocks(root: nn.Module, mesh: FoldedMesh) -> None:
    """Before they are cut, blocks in custom networks start out as rank 0's, and all of a network for stages.

    Collective.

    Raises:
        ValueError: If a block has parameters without storage.
    """
    blocks = [b for _, b in parallel_roots(root) if not isinstance(b, MoECausalLM) and b.mesh is None]
    networks = [n.module for n in layered_networks(root) if mesh.fold.pp > 1 and runner_of(n.module) is None]
    parameters = [p.detach() for block in (*networks, *blocks) for p in block.parameters()]
    parameters += [b.detach() for network in networks for b in network.buffers()]
    if any(p.is_meta for p in parameters):
        raise InputError(
            "a block of your network was made on the meta device and has no weights; only a MoECausalLM knows where to "
            "read them, so make your own network on a real device."
        )
    comm.broadcast_flat(parameters, mesh.world)


def align_randomness(mesh: FoldedMesh, device: torch.device) -> None:
    """Ranks of one data replica read the same samples, so they must also draw the same dropout and augmentations."""
    for name in ("tp", "cp", "pp"):
        comm.broadcast_object(Randomness(device), mesh.axis(name)).restore(device)


def _never() -> bool:
    """For a metric that has nobody to reduce with (a function, so that it can be pickled)."""
    return False

# SPDX-License-Identifier: Apache-2.0
"""Runs a custom network that says where its layers are (:mod:`.protocol`), in place of its ``forward``.

Calling the network gives what ``head`` returns for this data rank's rows. A pair (sum, weight) becomes the sum over all
ranks divided by the weight over all ranks; a scalar stays this data rank's own, to be averaged over data ranks as any loss
in Lightning.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lightning_moefold import comm
from lightning_moefold.fold import Fold
from lightning_moefold.layout import Family, ParameterLayout, ParameterPlan, TensorGradient
from lightning_moefold.mesh import FoldedMesh
from lightning_moefold.modules.balance import global_value
from lightning_moefold.modules.base import parallel_roots
from lightning_moefold.modules.moe import MoELayer
from lightning_moefold.parallel.network.position_check import check_positions
from lightning_moefold.parallel.network.protocol import LayeredNetwork, MissingLayer, is_ratio
from lightning_moefold.parallel.network.row_cut import RowCut, tell_blocks
from lightning_moefold.parallel.pipeline.network import StagedNetwork
from lightning_moefold.parallel.pipeline.pipeline import Pipeline
from lightning_moefold.parallel.roots import cut_root, make_groups, wrap_stage
from lightning_moefold.parallel.settings import Settings

_RUNNER = "_moefold_runner"


class NetworkRunner:
    """A network under a fold.

    Attributes:
        layouts: Of its own parameters (not those of blocks), by name, where stages hold different ones.
        names: Of all that it holds on some rank.
        pipeline: Runs it where there is more than one stage.
        shares_ends: Whether two ranks of a pipeline hold the parameters of its ends; the same on all ranks.
    """

    def __init__(self, network: LayeredNetwork, mesh: FoldedMesh, settings: Settings) -> None:
        self.network, self.mesh, self.settings = network, mesh, settings
        self.layouts: dict[str, ParameterLayout] = {}
        self.names = set(network.module.state_dict())
        self.pipeline: Pipeline | None = None
        self.shares_ends = False
        self._tried = False

    @property
    def fold(self) -> Fold:
        """The fold."""
        return self.mesh.fold

    @property
    def rank(self) -> int:
        """This rank in the fold."""
        return self.mesh.rank

    def use(self, settings: Settings) -> None:
        """Goes on under settings that a network which is cut may change to."""
        self.settings = settings
        if self.pipeline is not None:
            self.pipeline.runner.use(settings.plan)

    def __call__(self, batch: Any) -> Any:
        """Runs the network. Collective over all ranks.

        Args:
            batch: What ``embed`` and ``head`` take; tensors in it whose first dimension is that of its first tensor hold
                its rows.
        """
        if torch.is_inference_mode_enabled():  # what FSDP2 gathers in it would serve no training after it
            with torch.inference_mode(mode=False), torch.no_grad():
                return self(batch)
        if self.pipeline is not None:
            return self.pipeline(batch, self.settings)
        x_R = self.network.embed(batch)
        cut = RowCut.of(x_R.shape, self.mesh.axis("cp"), self.settings.exchange)
        tell_blocks(self.network.blocks(), cut)
        if cut is not None:
            if not self._tried and (wrong := check_positions(self.network.layers(), x_R, cut, self.mesh.stage)):
                raise wrong
            self._tried = True
            x_R = cut.enter(x_R)
        for layer in self.network.layers().values():
            x_R = layer(x_R)
        result = self.network.head(x_R if cut is None else cut.leave(x_R), batch)
        return self._ratio(*result) if is_ratio(result) else result

    def _ratio(self, total: Tensor, weight: Any) -> Tensor:
        mine = torch.stack([total.detach().double(), torch.as_tensor(weight, dtype=torch.float64, device=total.device)])
        if self.mesh.tp.index or self.mesh.axis("cp").index:  # they computed the same
            mine = torch.zeros_like(mine)
        totals = comm.all_reduce_raw(mine, self.mesh.stage)
        weights = torch.where(totals[1] == 0, torch.ones_like(totals[1]), totals[1])
        share = (total / weights).to(total.dtype)
        return global_value(share, totals[0] / weights, self.mesh, copies=self.mesh.fold.cp)

    def load_balancing_loss(self) -> Tensor | None:
        """That of the latest call where stages hold the layers; None where one rank has them all."""
        if self.pipeline is None:
            return None
        assert isinstance(self.pipeline.network, StagedNetwork)
        return self.pipeline.network.load_balancing_loss(self.pipeline)


def runner_of(module: nn.Module) -> NetworkRunner | None:
    """What runs a network; None for everything else."""
    return module.__dict__.get(_RUNNER)


def network_runners(root: nn.Module) -> list[tuple[str, NetworkRunner]]:
    """The runners of the networks in a module, by the networks' names."""
    return [(name, r) for name, m in root.named_modules() if (r := runner_of(m)) is not None]


def cut_network(network: LayeredNetwork, mesh: FoldedMesh, settings: Settings, device: torch.device) -> None:
    """Leaves the layers of a network to the stages of this rank, cuts its blocks, and takes over its calls.

    Its weights are the same on every rank.

    Raises:
        FoldError: If the fold does not suit a block.
        InputError: If the network cannot be cut into the stages.
    """
    runner = NetworkRunner(network, mesh, settings)
    make_groups(network.module, mesh)
    parts = _cut(runner) if mesh.fold.pp > 1 else {}
    for _, block in parallel_roots(network.module):
        cut_root(block, mesh, settings, device)
        if parts:
            here = (mesh.place["pp"],)
            block.layouts = {name: replace(layout, pp_ranks=here) for name, layout in block.layouts.items()}
    network.module.to(device)
    if parts:
        runner.pipeline = Pipeline(StagedNetwork(network, mesh, device), mesh, settings.plan, parts)
        meshes = [settings.sharding.data_mesh(mesh, family) for family in Family]
        for stage in runner.pipeline.stages:
            if any(isinstance(m, FSDPModule) for m in stage.modules()):
                wrap_stage(stage, next(m for m in meshes if m is not None))
    network.module.__dict__[_RUNNER] = runner
    network.module.forward = runner


def _cut(runner: NetworkRunner) -> dict[int, list[str]]:
    """Leaves to this rank what its stages need, and notes who holds which of the network's own parameters.

    The ends stay on the ranks of the first and of the last stage, since nobody says which of them ``embed`` uses, and which
    ``head``: so they may share weights.

    Returns:
        The layers of each stage of this rank.
    """
    network, mesh, plan = runner.network, runner.mesh, runner.settings.plan
    pp, place = mesh.fold.pp, mesh.place["pp"]
    layers = network.layers()
    costs = [_cost(layer) for layer in layers.values()]
    parts = [list(layers)[part.start : part.stop] for part in plan.cut(costs, pp, f"len({network.layers_name})")]
    count = len(parts)
    ends = tuple(dict.fromkeys(plan.owner(stage, pp) for stage in (0, count - 1)))
    runner.shares_ends = len(ends) == 2 and any(list(m.parameters(recurse=False)) for m in network.ends())
    holders = {id(p): ends for module in network.ends() for p in module.parameters(recurse=False)}
    for stage, part in enumerate(parts):
        holders |= {id(p): (plan.owner(stage, pp),) for name in part for p in layers[name].parameters()}
    blocks = {id(p) for block in network.blocks() for p in block.parameters()}
    runner.layouts = {
        name: ParameterLayout(tuple(p.shape), ParameterPlan(gradient=TensorGradient.IDENTICAL), None, holders[id(p)])
        for name, p in network.module.named_parameters(remove_duplicate=False)
        if place in holders[id(p)] and id(p) not in blocks
    }
    mine = plan.local_stages(pp, place)
    here = {name for stage in mine for name in parts[stage]}
    container = network.container
    for name, layer in layers.items():
        if name not in here:
            container._modules[name] = MissingLayer()
            layer.to("meta")  # for whoever holds it under another name
    if place not in ends:
        for module in network.ends():
            for leaf, _ in list(module.named_parameters(recurse=False)):
                module.register_parameter(leaf, None)
    return {stage: parts[stage] for stage in mine}


def _cost(layer: nn.Module) -> float:
    """Parameters that a token meets."""
    idle = {
        id(p): m.top_k / m.num_experts
        for m in layer.modules()
        if isinstance(m, MoELayer)
        for p in m.experts.parameters()
    }
    return float(sum(p.numel() * idle.get(id(p), 1.0) for p in layer.parameters()))

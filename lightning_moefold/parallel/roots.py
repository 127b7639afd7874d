# SPDX-License-Identifier: Apache-2.0
"""Cuts a model or block for a fold: parameters over tp, ep and etp, then wrap both families with FSDP2.

    experts   DTensor on (ep, etp)   fully_shard over edp       nested in its layer
    dense     DTensor on (tp)        fully_shard over dp x cp   per layer, then the rest of the model; or per block

Reductions are plain sums in both families: divide factor 1 with a forced sum is the one setting that is right on every
backend (gloo cannot pre-multiply). A mesh of one rank, which is wrapped because FSDP2 casts, is left without a factor: torch
would divide every gradient by it, into a copy.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from lightning_moefold.layout import Family, ParameterLayout, ParameterPlan
from lightning_moefold.mesh import FoldedMesh
from lightning_moefold.models import MoECausalLM
from lightning_moefold.models.blocks import check_blocks
from lightning_moefold.modules.base import ParallelModule, ParallelRoot
from lightning_moefold.modules.experts.experts import RoutedExperts
from lightning_moefold.modules.routers import Router
from lightning_moefold.parallel.hooks import keeping_hooks
from lightning_moefold.parallel.pipeline.language_model import cut_into_stages
from lightning_moefold.parallel.pipeline.stage import Stage
from lightning_moefold.parallel.settings import Settings, Sharding

_TENSOR_AXES = {Family.DENSE: ("tp",), Family.EXPERT: ("ep", "etp")}


def cut_root(model: ParallelRoot, mesh: FoldedMesh, settings: Settings, device: torch.device) -> None:
    """Cuts and wraps ``model`` in place and gives it its weights. No rank waits for another, except where groups are made.

    Args:
        model: A language model, with real weights or without storage and with a source of weights; or a block in a
            custom network, with the same weights on every rank.
        mesh: Of the fold; the fold must suit the model.
        settings: Of which the sharding, and for a language model the pipeline plan, say how it is cut.
        device: Where the parameters go.

    Raises:
        FoldError: If the fold does not suit the model.
        InputError: If the model cannot be cut into the stages, or trains parameters beside an adapter of another dtype.
        CheckpointError: If a weight cannot be read.
    """
    sharding = settings.sharding
    if isinstance(model, MoECausalLM):
        mesh.fold.validate(model.config)
        if model.quantized is not None:
            check_blocks(model.config, mesh.fold)
        if model.adapter is not None:
            model.adapter.check_trained(model)
    make_groups(model, mesh)
    plans = collect_plans(model, mesh)
    model.layouts = {
        name: _layout(tuple(p.shape), plans.get(name, ParameterPlan()), mesh, sharding)
        for name, p in model.named_parameters()
    }
    model.layouts |= {name: ParameterLayout(tuple(b.shape), ParameterPlan()) for name, b in model.stored_buffers()}
    stages = cut_into_stages(model, mesh, settings.plan) if isinstance(model, MoECausalLM) else []
    _cut_over_tensor_axes(model, mesh)
    if isinstance(model, MoECausalLM):
        model.cut_coded(plans, mesh)
    model.settings = settings
    for module in model.modules():
        if isinstance(module, ParallelModule):
            module.bind(mesh)
    _wrap(model, mesh, sharding, [stage.units() for stage in stages] or [model.units()])
    if isinstance(model, MoECausalLM) and model.weights_pending:
        with keeping_hooks(model):
            model.to_empty(device=device)
        model.load_weights()
    else:
        model.to(device)
        if isinstance(model, MoECausalLM):
            model.fill_coded()


def make_groups(module: nn.Module, mesh: FoldedMesh) -> None:
    """Makes the groups that blocks need, before stages leave blocks to each other: all ranks make the same. Collective."""
    for part in module.modules():
        if isinstance(part, ParallelModule):
            part.make_groups(mesh)


def collect_plans(model: nn.Module, mesh: FoldedMesh) -> dict[str, ParameterPlan]:
    """Returns how the blocks of a module cut their parameters, by name in it."""
    return {
        f"{prefix}.{name}".lstrip("."): plan
        for prefix, module in model.named_modules()
        if isinstance(module, ParallelModule)
        for name, plan in module.plans(mesh.fold).items()
    }


def _layout(shape: tuple[int, ...], plan: ParameterPlan, mesh: FoldedMesh, sharding: Sharding) -> ParameterLayout:
    layout = ParameterLayout(shape, plan)
    if sharding.mode == "none" or sharding.data_mesh(mesh, plan.family) is None:
        return layout
    sizes = layout.tensor_box(mesh.place).sizes
    return replace(layout, data_dim=_data_dim(sizes, plan, mesh.fold.size(layout.data_axis)))


def _data_dim(sizes: tuple[int, ...], plan: ParameterPlan, ranks: int) -> int:
    """Experts whose local number does not divide by edp are cut along the next dimension instead, where that divides.

    Flat stacks have different lengths on the ranks of ep, so their first dimension must not decide.
    """
    if plan.family is Family.DENSE:
        return 0
    if plan.flat:
        return int(sizes[1] % ranks == 0)
    return next((dim for dim in (0, 1) if sizes[dim] % ranks == 0), 0)


def _cut_over_tensor_axes(model: ParallelRoot, mesh: FoldedMesh) -> None:
    for name, parameter in list(model.named_parameters()):
        layout = model.layouts[name]
        prefix, _, leaf = name.rpartition(".")
        owner = model.get_submodule(prefix)
        storage = mesh.storage_mesh(layout.plan.family, *_TENSOR_AXES[layout.plan.family])
        if storage is None:
            continue
        dims = {cut.axis: cut.dim for cut in layout.plan.cuts}
        placements: list[Placement] = [
            Shard(dims[a]) if a in dims else Replicate() for a in storage.mesh_dim_names or ()
        ]
        piece = parameter.detach()[layout.tensor_box(mesh.place).slices()].clone()
        # Shape and stride are given because a piece may be uneven (the vocabulary need not divide by tp).
        stored = DTensor.from_local(
            piece, storage, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
        )
        owner.register_parameter(leaf, nn.Parameter(stored, requires_grad=parameter.requires_grad))


def _wrap(model: ParallelRoot, mesh: FoldedMesh, sharding: Sharding, groups: list[list[nn.Module]]) -> None:
    """Wraps both families.

    Args:
        model: With its parameters cut over the tensor axes.
        mesh: Of the fold.
        sharding: Data-parallel storage.
        groups: For each part that runs on its own (a pipeline stage, or the whole), the modules whose dense weights are
            gathered together, the outermost last.
    """
    dense, expert = (sharding.data_mesh(mesh, family) for family in (Family.DENSE, Family.EXPERT))
    storage = next(model.parameters()).dtype
    policy, uncast = sharding.policy(storage), sharding.policy(storage, cast=False)
    reshard = sharding.mode == "full"
    plain_experts: set[nn.Parameter] = set()
    for module in model.modules():
        if isinstance(module, RoutedExperts) and (expert is None or _is_empty(module)):
            plain_experts |= set(module.parameters())
        elif isinstance(module, RoutedExperts) and expert is not None:
            place = partial(_expert_placement, ranks=expert.size(), plan=module.plan)
            fully_shard(module, mesh=expert, mp_policy=policy, reshard_after_forward=reshard, shard_placement_fn=place)
        elif isinstance(module, Router) and dense is not None and sharding.mixed_dtype is not None:
            # The router computes in float32 whatever the precision, so its weight is not cast.
            fully_shard(module, mesh=dense, mp_policy=uncast, reshard_after_forward=reshard)
    for *layers, last in groups:
        if dense is not None:
            for unit in (*layers, last):
                # What is last in forward is first in backward.
                again = reshard and (unit is not last or not layers)
                fully_shard(
                    unit, mesh=dense, mp_policy=policy, reshard_after_forward=again, ignored_params=plain_experts
                )
        elif expert is not None and isinstance(last, Stage):
            wrap_stage(last, expert)
    if dense is not None or expert is not None:
        model.compute_dtype = sharding.mixed_dtype
    for module in {m: None for root in (model, *(group[-1] for group in groups)) for m in root.modules()}:
        if isinstance(module, FSDPModule):
            wrapped = expert if isinstance(module, RoutedExperts) or dense is None else dense
            _sum_plainly(module, wrapped)
    for *layers, last in groups:
        _prefetch(layers or [last])


def wrap_stage(stage: Stage, mesh: DeviceMesh) -> None:
    """Makes a stage an FSDP2 module, if only around those in it: a schedule reduces what belongs to one."""
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    rest = set(stage.parameters())
    fully_shard(stage, mesh=mesh, mp_policy=policy, reshard_after_forward=False, ignored_params=rest)


def _sum_plainly(module: FSDPModule, mesh: DeviceMesh | None) -> None:
    """Has FSDP2 sum gradients over ``mesh``, which it averages otherwise."""
    if mesh is not None and mesh.size() > 1:
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def _prefetch(layers: list[nn.Module]) -> None:
    """Has each layer gather its experts and the next layer early.

    The dispatcher waits for token counts in every layer, so the host is never ahead and gathers nothing in advance by
    itself.
    """
    for layer, following in zip(layers, [*layers[1:], None], strict=True):
        ahead = [m for m in (*layer.modules(), following) if isinstance(m, FSDPModule) and m is not layer]
        if isinstance(layer, FSDPModule) and ahead:
            layer.set_modules_to_forward_prefetch(cast("list[FSDPModule]", ahead))


def _is_empty(module: nn.Module) -> bool:
    """Whether a rank, and so all that hold the same experts, has none of their channels: FSDP2 reduces no empty gradients."""
    return all(not (p.to_local() if isinstance(p, DTensor) else p).numel() for p in module.parameters())


def _expert_placement(parameter: nn.Parameter, ranks: int, plan: ParameterPlan) -> Shard:
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return Shard(_data_dim(tuple(local.shape), plan, ranks))

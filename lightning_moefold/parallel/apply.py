# SPDX-License-Identifier: Apache-2.0
"""The one door by which a fold and its settings reach a module: the strategy, ``fold="auto"`` and rehearsals go through it.

What decides how a module is cut (the fold, sharding, precision, where pipeline stages lie) is settled when it comes here
first. All other settings may differ in a later call, and then apply as on a fresh module.
"""

from __future__ import annotations

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from lightning_moefold import comm
from lightning_moefold.dispatch import DispatchConfig, ExpertAxes
from lightning_moefold.errors import InputError
from lightning_moefold.fold import Fold
from lightning_moefold.mesh import FoldedMesh
from lightning_moefold.models import MoECausalLM
from lightning_moefold.modules.base import ParallelRoot, parallel_roots
from lightning_moefold.modules.decoder import DecoderLayer
from lightning_moefold.modules.experts import Experts
from lightning_moefold.modules.experts.experts import RoutedExperts
from lightning_moefold.modules.experts.packed import PackedExperts
from lightning_moefold.modules.moe import MoELayer
from lightning_moefold.modules.quantized import coded_weights
from lightning_moefold.modules.recompute_parts import half_is_recomputed, recompute_parts
from lightning_moefold.parallel.compiling import compile_layers
from lightning_moefold.parallel.network.protocol import layered_networks
from lightning_moefold.parallel.network.runner import NetworkRunner, cut_network, network_runners, runner_of
from lightning_moefold.parallel.roots import cut_root
from lightning_moefold.parallel.settings import Settings
from lightning_moefold.parallel.tree import check_second_names


def parallelize(module: nn.Module, mesh: FoldedMesh, settings: Settings, device: torch.device) -> None:
    """Brings a module under a fold and its settings, in place, and gives it its weights.

    No rank waits for another, except where groups are made.

    Args:
        module: Holds language models, with real weights or without storage and with a source of weights; blocks, and
            custom networks that name their layers, both with the same weights on every rank. Or is one of them.
        mesh: Of the fold; the fold must suit the models.
        settings: How they are cut and run.
        device: Where the parameters go.

    Raises:
        FoldError: If the fold does not suit a model or a block.
        InputError: If a model cannot be cut into the stages, or has been cut already under what cannot change.
        CheckpointError: If a weight cannot be read.
    """
    check_settings(module, mesh.fold, settings)
    check_recompute(module, settings)
    for experts in (m for m in module.modules() if isinstance(m, Experts)):
        experts.check_kernel(
            settings.expert_kernel, mesh.fold, settings.sharding.mixed_dtype or experts.gate_proj.dtype, device
        )
    for packed in (m for m in module.modules() if isinstance(m, PackedExperts)):
        packed.check_kernel(settings.expert_kernel)
    check_compiler(module, settings)
    earlier = [part.settings for part in parts_of(module) if part.mesh is not None]
    tell(module, settings)
    if any(before.dispatch != settings.dispatch for before in earlier):
        _make_dispatchers(module, mesh)
    for network in layered_networks(module):
        if runner_of(network.module) is None:
            cut_network(network, mesh, settings, device)
    check_second_names(module, device)  # before the blocks among them are cut
    for _, root in parallel_roots(module):
        if root.mesh is None:
            cut_root(root, mesh, settings, device)
    check_second_names(module, device)
    for part in parts_of(module):
        part.use(settings)
    layers = [part for part in module.modules() if isinstance(part, DecoderLayer)]
    if settings.compiler is not None and layers:
        rank_zero_info(compile_layers(layers, settings.compiler, settings.sharding.mixed_dtype))
    elif any(before.compiles for before in earlier):
        for layer in layers:
            layer.uncompile()


def check_settings(module: nn.Module, fold: Fold, settings: Settings) -> None:
    """Checks, before anything changes, that what has been cut already can go on under another fold or other settings.

    Raises:
        InputError: Naming the setting that cannot change any more.
    """
    for part in parts_of(module):
        if part.mesh is None:
            continue
        if part.fold != fold or not part.mesh.is_alive:
            now = f"the fold {str(fold)!r}" if part.fold != fold else "process groups that were made later"
            raise InputError(
                f"an earlier Trainer has cut this module under the fold {str(part.fold)!r}, which cannot change to {now} any more; "
                "give the same again, or make a new model."
            )
        part.settings.check_successor(settings, fold.pp)


def check_recompute(module: nn.Module, settings: Settings) -> None:
    """Checks that there are the layers of which something is to be recomputed or to go to host memory.

    Raises:
        InputError: Naming the part.
    """
    if settings.offload and not any(isinstance(part, DecoderLayer) for part in module.modules()):
        raise InputError(
            f"offload_activations=True moves what decoder layers keep, but {type(module).__name__} holds none; leave it out."
        )
    parts = recompute_parts(settings.recompute)
    for config in (root.config for _, root in parallel_roots(module) if isinstance(root, MoECausalLM)):
        kinds = {"mlp": config.num_hidden_layers - config.num_moe_layers, "moe": config.num_moe_layers}
        for part in sorted(part for part, number in kinds.items() if part in parts and not number):
            what = "dense layer" if part == "mlp" else "layer with experts"
            raise InputError(f"recompute names {part!r}, but the model has no {what}; leave it out.")


def check_compiler(module: nn.Module, settings: Settings) -> None:
    """Raises InputError where layers would be compiled whose weights are stored as bytes."""
    codec = next((part.codec for _, part, _ in coded_weights(module)), None)
    if settings.compiles and codec is not None:
        raise InputError(
            f"compile=True does not compile layers whose weights quantize={codec.kind!r} stores as bytes; leave one of them out."
        )


def parts_of(module: nn.Module) -> list[ParallelRoot | NetworkRunner]:
    """The models, blocks and networks in a module that are cut, or to be cut, as one each."""
    return [*(root for _, root in parallel_roots(module)), *(runner for _, runner in network_runners(module))]


def tell(module: nn.Module, settings: Settings) -> None:
    """Hands each part what concerns it."""
    parts = recompute_parts(settings.recompute)
    again = "expert_activation" in parts and not half_is_recomputed(parts, moe=True)
    for part in module.modules():
        if isinstance(part, DecoderLayer):
            part.recompute, part.offload = settings.recompute, settings.offload
        elif isinstance(part, MoELayer):
            part.use_dispatch(settings.dispatch)
        elif isinstance(part, RoutedExperts):
            part.again = again
            if isinstance(part, Experts | PackedExperts):
                part.kernel = settings.expert_kernel


def _make_dispatchers(module: nn.Module, mesh: FoldedMesh) -> None:
    """Makes the dispatchers of layers that were cut under another choice. Collective over the world."""
    layers = [part for part in module.modules() if isinstance(part, MoELayer) and part.mesh is not None]
    configs = [layer.settled(mesh) for layer in layers]
    by_node = {config.node_size for config in configs if config.dispatcher == "hierarchical"}
    everyone = comm.all_gather_objects(
        by_node, mesh.world
    )  # stages hold different layers, and all ranks make the same groups
    for size in sorted({size for sizes in everyone for size in sizes if size is not None}):
        ExpertAxes.of(mesh, DispatchConfig("hierarchical", node_size=size))
    for layer, config in zip(layers, configs, strict=True):
        if config != layer.dispatcher.config:
            layer.bind(mesh)

# SPDX-License-Identifier: Apache-2.0
"""Refuses features that cannot work under a fold, each in one sentence that says what to do."""

from __future__ import annotations

from fnmatch import fnmatchcase

import lightning.pytorch as pl
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    ThroughputMonitor,
    WeightAveraging,
)
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_moefold import comm
from lightning_moefold.errors import InputError, UnsupportedFeature
from lightning_moefold.fold import Fold
from lightning_moefold.mesh import Axis, FoldedMesh
from lightning_moefold.models import MoECausalLM
from lightning_moefold.modules.base import parallel_roots
from lightning_moefold.modules.decoder import DecoderLayer
from lightning_moefold.modules.quantized import coded_weights
from lightning_moefold.optim import Muon
from lightning_moefold.parallel import Settings
from lightning_moefold.parallel.apply import check_settings
from lightning_moefold.parallel.network.protocol import LayeredNetwork, layered_networks
from lightning_moefold.parallel.tree import check_trees

#: Callbacks that need whole parameters, which exist on one rank only (except in ``bf16-mixed``, see below).
_WHOLE = {
    StochasticWeightAveraging: "it copies the module, whose weights are spread over ranks; average exported checkpoints instead",
    WeightAveraging: "it copies the module, whose weights are spread over ranks; average exported checkpoints instead",
    BaseFinetuning: "it adds parameters to the optimizer by hand; give the optimizer all of them and freeze and unfreeze with "
    "requires_grad_, in configure_model or in a hook",
    ModelPruning: "it replaces parameters, whose pieces the ranks know by name; prune an exported checkpoint instead",
}
#: Callbacks that work on one rank but not on several.
_ALONE = {
    OnExceptionCheckpoint: "a save needs every rank, and only the failing one would call it; use ModelCheckpoint",
    LearningRateFinder: "it saves and restores the model behind the strategy's back; tune on a small model in one process",
    BatchSizeFinder: "it saves and restores the model behind the strategy's back; set the batch size by hand",
}

#: Optimizers by the names of their classes, from any package. All others are watched in their first step.
_OPTIMIZERS = {
    ("LBFGS", "Adafactor", "*Muon*", "*Shampoo*", "SOAP", "*[Ll]amb", "*LAMB", "LARS", "Lars", "*Ga[Ll]ore*", "Apollo*", "APOLLO*"):
        "computes with whole parameters, of which a rank holds pieces; use AdamW, SGD or lightning_moefold.optim.Muon",
    ("*8bit", "*4bit", "*Fp8", "*FP8"):
        "quantizes its state in blocks of what a rank holds, which depends on the fold; use AdamW or SGD",
    ("Rprop",): "assigns by index, which pieces of parameters do not allow; use AdamW or SGD",
    ("ZeroRedundancyOptimizer", "CPUOffloadOptimizer"):
        "spreads state by itself, which the strategy has done already; give it the optimizer inside",
}  # fmt: skip


def check_run(trainer: pl.Trainer, module: pl.LightningModule, settings: Settings, mesh: FoldedMesh) -> None:
    """Checks all that is known before anything is built. Collective.

    Raises:
        InputError: Naming what cannot work.
    """
    check_trainer(trainer, module, mesh.fold)
    check_settings(module, mesh.fold, settings)
    check_trees(module, mesh.fold)
    check_blocks(module, mesh.fold)
    _check_microbatches(settings.num_microbatches, mesh.world)
    if settings.compiles and not any(isinstance(part, DecoderLayer) for part in module.modules()):
        raise UnsupportedFeature(
            f"compile=True compiles decoder layers, but {type(module).__name__} holds none; leave it out, and compile your own "
            "modules with their method compile() in configure_model."
        )


def check_blocks(module: nn.Module, fold: Fold) -> None:
    """Refuses blocks that context or pipeline parallelism cannot cut, because rows and layers of their network are unknown.

    Raises:
        UnsupportedFeature: If a block is in a custom network that does not name its layers, a pipeline has no model, or
            a block shares a parameter.
    """
    roots, networks = parallel_roots(module), layered_networks(module)
    try:
        layers = {id(block) for network in networks for block in network.blocks()}
    except ValueError as error:
        raise UnsupportedFeature(str(error)) from None
    for name, root in roots:
        if fold.cp * fold.pp > 1 and not isinstance(root, MoECausalLM) and id(root) not in layers:
            axis, size = ("context", fold.cp) if fold.cp > 1 else ("pipeline", fold.pp)
            what = "rows context" if fold.cp > 1 else "layers pipeline"
            raise UnsupportedFeature(
                f"{name or type(root).__name__} is in a custom network, whose {what} parallelism cannot cut unless the "
                "network names its layers (pipeline_layers, embed and head) and the block is in one of them; name them, or use "
                f"{axis}_parallel_size=1 instead of {size}."
            )
    if fold.pp > 1 and not roots and not networks:
        raise UnsupportedFeature(
            f"{type(module).__name__} holds no MoECausalLM to cut into stages, and no network with pipeline_layers; use "
            f"pipeline_parallel_size=1 instead of {fold.pp}."
        )
    for network in networks:
        _check_layers(network, fold)
    _check_sharing(module)


def _check_layers(network: LayeredNetwork, fold: Fold) -> None:
    """Refuses layers of a custom network whose results micro-batches or cut rows would change."""
    cut = network.module.modules() if fold.pp > 1 else network.container.modules() if fold.cp > 1 else ()
    for part in cut:
        if isinstance(part, _BatchNorm) and part.track_running_stats:
            raise UnsupportedFeature(
                f"{type(part).__name__} in {network.name or type(network.module).__name__} takes statistics of a whole batch, of "
                "which a pipeline or cp sees parts; use another norm, such as LayerNorm or GroupNorm."
            )
    if fold.pp == 1:
        return
    if len(set(map(id, network.layers().values()))) < len(network.layers()):
        raise UnsupportedFeature(
            f"{network.layers_name} holds a layer twice, and another pipeline stage may hold the second; give each its own."
        )
    holders: dict[int, str] = {}
    ends = [p for m in network.ends() for p in m.parameters(recurse=False)]
    layers = {f"layer {name} of {network.layers_name}": layer.parameters() for name, layer in network.layers().items()}
    for name, parameters in [("embed or head", iter(ends)), *layers.items()]:
        for parameter in parameters:
            if (first := holders.setdefault(id(parameter), name)) != name:
                raise UnsupportedFeature(
                    f"{name} shares a parameter with {first}, which another pipeline stage may hold; give each its own."
                )


def _check_microbatches(number: int, world: Axis) -> None:
    """Checks that all ranks cut batches alike; otherwise routing statistics would cover different tokens. Collective."""
    everyone = comm.all_gather_objects(number, world)
    if len(set(everyone)) > 1:
        what = ", ".join(f"{n} on rank {everyone.index(n)}" for n in sorted(set(everyone)))
        raise UnsupportedFeature(f"num_microbatches differs, {what}; give every rank the same.")


def _check_sharing(module: nn.Module) -> None:
    """Refuses shared parameters: cutting replaces a parameter in one place, and other holders would keep the old one."""
    holders: dict[int, tuple[str, nn.Module]] = {}  # holders of each parameter, under any name of a module
    roots: dict[int, str] = {}  # root of each module in a block
    for name, root in parallel_roots(module):
        for part_name, part in root.named_modules(prefix=name):
            for parameter in part.parameters(recurse=False):
                first, other = holders.setdefault(id(parameter), (part_name, part))
                if other is not part or roots.setdefault(id(part), name) != name:
                    raise UnsupportedFeature(_shared(first, part_name))
    for name, part in module.named_modules():
        for parameter in part.parameters(recurse=False):
            first, other = holders.get(id(parameter), (name, part))
            if other is not part:
                raise UnsupportedFeature(_shared(first, name))


def _shared(first: str, second: str) -> str:
    return (
        f"{first} and {second} share a parameter, and the strategy spreads those of a block over ranks; give each its own, or "
        "call one of them in both places."
    )


def check_trainer(trainer: pl.Trainer, module: pl.LightningModule, fold: Fold) -> None:
    """Checks the Trainer's features, its callbacks and plugins.

    Raises:
        UnsupportedFeature: If a feature cannot work; the message names it and says what to do.
        InputError: If a number of the Trainer's means nothing.
    """
    if trainer.gradient_clip_val is not None and trainer.gradient_clip_val < 0:
        raise InputError(
            f"gradient_clip_val={trainer.gradient_clip_val} would clip nothing; give a positive number, or leave it out."
        )
    if trainer.accumulate_grad_batches < 1:
        raise InputError(f"accumulate_grad_batches={trainer.accumulate_grad_batches} must be at least 1.")
    spread = bool(parallel_roots(module)) or fold.pp > 1
    shared = spread and fold.world_size > 1
    # In mixed precision FSDP2 casts, and so wraps the model, also on one rank.
    wrapped = spread and trainer.precision == "bf16-mixed"
    kinds = (_WHOLE if shared or wrapped else {}) | (_ALONE if shared else {})
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for kind, reason in kinds.items():
            if isinstance(callback, kind):
                raise UnsupportedFeature(f"{type(callback).__name__} does not work with MoEFoldStrategy: {reason}.")
        if (
            isinstance(callback, WeightAveraging)
            and getattr(callback, "_use_buffers", True)
            and any(coded_weights(module))
        ):
            raise UnsupportedFeature(
                f"{type(callback).__name__} would average the bytes in which quantize stores weights; give it use_buffers=False."
            )
        if shared and isinstance(callback, ModelCheckpoint) and getattr(callback, "save_on_exception", False):
            raise UnsupportedFeature(
                "ModelCheckpoint(save_on_exception=True) would save on the failing rank only; turn it off."
            )
        if isinstance(callback, ThroughputMonitor) and fold.dp < fold.world_size:
            raise UnsupportedFeature(
                f"{type(callback).__name__} multiplies by the number of ranks, but under {fold} some ranks read the same samples; "
                "use MFUMonitor."
            )
    if getattr(trainer.strategy, "_layer_sync", None) is not None and (spread or fold.dp < fold.world_size):
        raise UnsupportedFeature(
            "sync_batchnorm=True works only for modules without MoE blocks, under a fold of data ranks; leave it off, or use "
            "a norm without batch statistics."
        )
    if trainer._detect_anomaly and spread and not fold.tp == fold.ep == fold.etp == 1:
        raise UnsupportedFeature(
            f"detect_anomaly=True searches for NaNs with an operation that torch lacks for tensors cut over tp, ep or etp, as "
            f"under {fold}; search under a fold of data ranks only."
        )
    for logger in trainer.loggers if spread and trainer.checkpoint_callbacks else ():
        # Also of MLFlowLogger and LitLogger. Lightning's DummyLogger of fast_dev_run has every attribute that is asked for.
        if uploads := not isinstance(logger, DummyLogger) and getattr(logger, "_log_model", False):
            raise UnsupportedFeature(
                f"{type(logger).__name__}(log_model={uploads!r}) uploads files, but checkpoints of this strategy are "
                "directories; leave log_model out, and upload what save_pretrained writes."
            )
    writer = trainer.strategy.checkpoint_io
    if type(writer) is not TorchCheckpointIO and spread:
        raise UnsupportedFeature(
            f"{type(writer).__name__} cannot write a model that is spread over ranks, which the strategy writes itself; leave "
            "the plugin out."
        )


def check_optimizers(trainer: pl.Trainer, sharded: bool) -> None:
    """Checks the optimizers of a module whose parameters are stored in pieces, not whole as under DDP.

    Raises:
        UnsupportedFeature: If an optimizer needs whole parameters.
    """
    for optimizer in trainer.optimizers if sharded else ():
        inner = getattr(optimizer, "inner", optimizer)  # the optimizer inside MasterWeights
        if isinstance(inner, Muon):  # ours gathers the matrices
            continue
        names = [kind.__name__ for kind in type(inner).__mro__]
        for patterns, reason in _OPTIMIZERS.items():
            if any(fnmatchcase(name, pattern) for name in names for pattern in patterns):
                raise UnsupportedFeature(f"{names[0]} {reason}.")

# SPDX-License-Identifier: Apache-2.0
"""Compares a model with what its configuration declares, before anything is cut: parts are found by their names."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel

from lightning_moefold.errors import TreeError, UnsupportedFeature
from lightning_moefold.fold import Fold
from lightning_moefold.models import MoECausalLM
from lightning_moefold.modules.base import ParallelModule, ParallelRoot, parallel_roots
from lightning_moefold.modules.quantized import Codec
from lightning_moefold.modules.routers import Router

_WRAPPERS = (DistributedDataParallel, FullyShardedDataParallel, DataParallel, FSDPModule)


def check_trees(root: nn.Module, fold: Fold) -> None:
    """Checks every model and block of a LightningModule that is not parallelised yet.

    Raises:
        TreeError: Naming the first part that is wrapped, replaced, added or missing.
    """
    roots = [(name, part) for name, part in parallel_roots(root) if part.mesh is None]
    ours = {id(m) for _, part in roots for m in part.modules()}
    for name, module in root.named_modules():
        kind = next((kind.__name__ for kind in _WRAPPERS if isinstance(module, kind)), None)
        if kind is not None and any(id(m) in ours for m in module.modules()):
            kind = "fully_shard" if kind == "FSDPModule" else kind
            raise TreeError(f"{name} is wrapped by {kind}, which the strategy does itself; hand it the plain module.")
    for name, part in roots:
        for parameter_name, parameter in part.named_parameters(prefix=name):
            if isinstance(parameter, DTensor):
                raise TreeError(f"{parameter_name!r} is cut already, as a DTensor; hand the strategy the plain module.")
        if isinstance(part, MoECausalLM):
            _check_model(part, name)
        else:
            _check_block(part, name, fold)


def check_second_names(module: nn.Module, device: torch.device) -> None:
    """Everything has storage but models that are to read their weights, and what a pipeline has taken off this rank.

    Args:
        module: The LightningModule.
        device: Where parameters go; on the meta device, where a rank is rehearsed, nothing has storage.

    Raises:
        UnsupportedFeature: For a part of a model that the module holds under a name of its own, on another stage.
    """
    if device.type == "meta":
        return
    models = (m for m in module.modules() if isinstance(m, MoECausalLM) and m.weights_pending)
    pending = {id(p) for model in models for p in model.parameters()}
    for name, parameter in module.named_parameters():
        if parameter.is_meta and id(parameter) not in pending:
            raise UnsupportedFeature(
                f"{name!r} is a second name for a part of a model that another pipeline stage holds; reach it through the model "
                "instead, or use pipeline_parallel_size=1."
            )


def _check_model(model: MoECausalLM, name: str) -> None:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        declared = MoECausalLM(model.config)
        if model.quantized is not None:
            declared.quantize(Codec(model.quantized, torch.get_default_dtype()))
        if model.adapter is not None:
            declared.add_adapter(model.adapter.lora)
    modules = dict(declared.named_modules())
    for path, module in model.named_modules():
        full = f"{name}.{path}".strip(".")
        if path not in modules:
            raise TreeError(_unknown(full, module, model))
        kind = Router if isinstance(modules[path], Router) else type(modules[path])
        if not isinstance(module, kind):
            raise TreeError(_replaced(full, module, kind))
    tensors = dict(declared.named_parameters()) | dict(declared.named_buffers())
    held: dict[str, Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
    for path, tensor in held.items():
        full = f"{name}.{path}".strip(".")
        if path not in tensors:
            raise TreeError(_unknown(full, tensor, model))
        if tensor.shape != tensors[path].shape:
            raise TreeError(
                f"{full!r} has the shape {list(tensor.shape)}, and the configuration makes it {list(tensors[path].shape)}; change "
                "the configuration with it, or make the model from one of the new size."
            )
    missing = next(
        (path for path in (*modules, *tensors) if path not in {*held, *(n for n, _ in model.named_modules())}), None
    )
    if missing is not None:
        raise TreeError(
            f"{type(model).__name__} has no {f'{name}.{missing}'.strip('.')!r} (any more), or under two names; the strategy needs "
            "every part that the configuration declares, once."
        )


def _unknown(full: str, what: nn.Module | Tensor, model: MoECausalLM) -> str:
    kind = type(what).__name__
    return (
        f"{full} ({kind}) is no part that the configuration of {type(model).__name__} declares, and the strategy cuts the parts by "
        "their names; take it off, or hold what you add beside the model, in the LightningModule."
    )


def _replaced(full: str, module: nn.Module, kind: type) -> str:
    if isinstance(module, OptimizedModule):
        return f"{full} is wrapped by torch.compile, which changes the names of its parts; compile it in place, with its compile()."
    return (
        f"{full} is a {type(module).__name__} where the model has its own {kind.__name__}, and the strategy would not know how to "
        "cut it; leave the model's own part there, and hold what you add beside the model, in the LightningModule."
    )


def _check_block(block: ParallelRoot, name: str, fold: Fold) -> None:
    """A block names the parameters that it computes with; one that has got another name would not be found, or stay whole."""
    for path, module in block.named_modules(prefix=name):
        if isinstance(module, ParallelModule):
            held = dict(module.named_parameters(remove_duplicate=False))
            for leaf in module.plans(fold):
                if leaf not in held:
                    raise TreeError(
                        f"{path or type(module).__name__} has no parameter {leaf!r} (any more), which it computes with; a "
                        f"part of {type(module).__name__} has been wrapped or replaced: leave it as it is."
                    )

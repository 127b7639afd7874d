# SPDX-License-Identifier: Apache-2.0
"""Converts between Lightning's checkpoint dictionary and layout-free files with models and optimizers under global names.

    model.<parameter or buffer>              optimizer.<i>.<parameter>.<state>

Optimizer state of a parameter's shape is stored in that parameter's boxes; anything else (a step counter) whole. The
configuration of each model goes with the rest (:data:`MODELS`), so that a checkpoint can be read without the run. Of a model
with an adapter, what has never trained is left to its base (:mod:`.adapter_runs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_moefold import comm
from lightning_moefold.agreement import agreeing
from lightning_moefold.balance.placement import Placement, check_successor
from lightning_moefold.checkpoint.chunk_reader import StoredTensors
from lightning_moefold.checkpoint.chunks import TensorPiece
from lightning_moefold.checkpoint.sharded import MODELS, Packed, check_readable, pack
from lightning_moefold.errors import CheckpointError, InputError
from lightning_moefold.lifecycle import adapter_runs
from lightning_moefold.lifecycle.same_model import check_same_model
from lightning_moefold.mesh import Axis
from lightning_moefold.models import MoECausalLM
from lightning_moefold.optim.state_offload import bring_state
from lightning_moefold.parallel import local_part
from lightning_moefold.parallel.gradients import like
from lightning_moefold.parallel.migration import move_experts
from lightning_moefold.parallel.parameters import ParameterRegistry

#: Where a checkpoint says which expert was in which slot: by layer, ``{"parts": ep, "expert_of_slot": [...]}``.
PLACEMENTS = "moefold_expert_placements"


def optimizer_state(optimizer: Optimizer | LightningOptimizer, registry: ParameterRegistry) -> dict[str, Any]:
    """Returns the state by parameter name: ``{"state": {name: {key: value}}, "param_groups": [...]}``.

    Raises:
        CheckpointError: If the optimizer holds a parameter that the module does not have.
    """
    optimizer = _unwrap(optimizer)
    bring_state(optimizer)
    names = _names(optimizer, registry)
    state = {names[id(p)]: dict(values) for p, values in optimizer.state.items()}
    return {"state": state, "param_groups": _groups(optimizer, names)}


def _groups(optimizer: Optimizer, names: dict[int, str]) -> list[dict[str, Any]]:
    """Returns the parameter groups with names instead of parameters."""
    return [
        {k: v for k, v in group.items() if k != "params"}
        | {"params": [names[id(p)] for p in group["params"] if id(p) in names]}
        for group in optimizer.param_groups
    ]


def _unwrap(optimizer: Optimizer | LightningOptimizer) -> Optimizer:
    return optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def _names(optimizer: Optimizer, registry: ParameterRegistry) -> dict[int, str]:
    names = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not parameter.numel() and id(parameter) not in registry.names:
                continue  # a pipeline stage where everything is frozen
            if id(parameter) not in registry.names:
                raise CheckpointError(
                    "the optimizer holds a parameter that is not in the module; register it as a parameter."
                )
            names[id(parameter)] = registry.names[id(parameter)]
    return names


def describe_training_state(
    path: str | Path, checkpoint: dict[str, Any], registry: ParameterRegistry, *, summed: bool = True
) -> tuple[Packed, dict[str, Tensor | TensorPiece]]:
    """Describes Lightning's ``checkpoint`` for :func:`~.checkpoint.sharded.save_sharded`. Collective.

    Its ``state_dict`` and ``optimizer_states`` are removed from it.

    Returns:
        Everything except the tensors, serialised, and the tensors, which share memory with module and optimizers.
    """
    tensors: dict[str, Tensor | TensorPiece] = {}
    extra = {}
    adapter_runs.note_trained(registry)
    of_base = adapter_runs.left_out(registry)
    for name, value in checkpoint.pop("state_dict").items():
        if name in of_base:
            continue
        if isinstance(value, Tensor):
            tensors[f"model.{name}"] = _describe(value, name, registry)
        else:  # values of nn.Module.get_extra_state
            extra[name] = value
    groups = []
    for index, state in enumerate(checkpoint.pop("optimizer_states", [])):
        groups.append(_groups_of_all_stages(_plain(state["param_groups"]), registry.mesh.axis("pp")))
        for name, values in state["state"].items():
            for key, value in values.items():
                tensors[f"optimizer.{index}.{name}.{key}"] = _describe(value, name, registry)
    models = {name: part.describe() for name, part in registry.roots.items() if isinstance(part, MoECausalLM)}
    meta = {**checkpoint, "fold": str(registry.mesh.fold), "optimizer_groups": groups, "extra_state": extra}
    meta[MODELS], meta[PLACEMENTS] = models, _placements_of_all_stages(registry)
    if registry.mesh.stage.index > 0:
        # Rank 0 writes what every rank has: running statistics are those of rank 0, as under DDP.
        tensors = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, TensorPiece)}
    return pack(path, meta, registry.mesh.world, summed=summed), tensors


def _placements_of_all_stages(registry: ParameterRegistry) -> dict[str, Any]:
    """Returns the placements of layers in which experts have moved. Collective over ``pp``."""
    return {
        name: {"parts": placement.parts, "expert_of_slot": list(placement.expert_of_slot)}
        for name, placement in registry.everyones_placements().items()
        if not placement.is_contiguous
    }


def _restore_placements(
    path: str | Path,
    meta: dict[str, Any],
    registry: ParameterRegistry,
    optimizers: Sequence[Optimizer | LightningOptimizer],
) -> None:
    """Brings experts to where they were when the checkpoint was saved if ep is the same, else to the slots of their numbers.

    They are moved as they are, because not all of them need be in the checkpoint: the base of an adapter is not. Collective.
    """
    ep, stored, now = registry.mesh.fold.ep, meta.pop(PLACEMENTS, {}), registry.everyones_placements()
    placements = {name: Placement.contiguous(placement.num_experts, ep) for name, placement in now.items()}
    if any(item.get("parts") != ep for item in stored.values()):
        rank_zero_info(
            f"{path} was saved with experts on other ranks of another ep; under ep={ep} they begin in order."
        )
    for name, placement in now.items():
        if stored.get(name, {}).get("parts") == ep:
            try:
                placements[name] = Placement(tuple(stored[name]["expert_of_slot"]), ep)
                check_successor(placement, placements[name])
            except (InputError, KeyError, TypeError, ValueError) as error:
                raise CheckpointError(f"{path} is damaged: its placement of {name} cannot be read ({error}).") from None
    if placements != now:
        move_experts(registry, [_unwrap(optimizer) for optimizer in optimizers], placements)


def _groups_of_all_stages(groups: list[dict[str, Any]], pp: Axis) -> list[dict[str, Any]]:
    """Merges the parameter lists of all pipeline stages, group by group. Collective over ``pp``."""
    if pp.size == 1:
        return groups
    parts = comm.all_gather_objects([group["params"] for group in groups], pp)
    if any(len(part) != len(groups) for part in parts):
        raise CheckpointError(
            f"the optimizer has {[len(part) for part in parts]} parameter groups on the pipeline stages; make as many on each, "
            "empty ones where a stage has none of the parameters."
        )
    together = [list(dict.fromkeys(name for part in parts for name in part[i])) for i in range(len(groups))]
    return [{**group, "params": names} for group, names in zip(groups, together, strict=True)]


def _plain(value: Any) -> Any:
    """Converts hyperparameters to numbers, since a learning rate may be a tensor."""
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else value.cpu()
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _describe(value: Any, name: str, registry: ParameterRegistry) -> Tensor | TensorPiece:
    tensor = value if isinstance(value, Tensor) else torch.as_tensor(value)
    local = local_part(tensor)
    layout = registry.layouts.get(name)
    if layout is None:
        return local
    sizes = layout.stored_box(registry.mesh.fold, registry.mesh.rank).sizes
    if tuple(tensor.shape) != layout.shape and tuple(local.shape) != sizes:
        cut = sizes != layout.shape
        if local.numel() != tensor.numel() or (cut and local.numel() > 1):
            raise CheckpointError(
                f"the optimizer keeps state of shape {list(tensor.shape)} for {name!r} of shape {list(layout.shape)}, which "
                "cannot be stored independently of the fold; use an optimizer with state for each element, such as AdamW."
            )
        return local
    return TensorPiece(local, registry.boxes(name), layout.shape, registry.owns(name), layout.is_expert_stack)


def check_saveable(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Checks before training those parts of ModelCheckpoint's checkpoints that are known by then.

    Raises:
        CheckpointError: If a hyperparameter or a state could not be read back; the message names it.
    """
    savers = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    if not savers or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    data = trainer.datamodule  # type: ignore[attr-defined]
    for owner in (module, data):
        for name, value in (owner.hparams if owner is not None else {}).items():
            check_readable(value, f"the hyperparameter {name!r} of {type(owner).__name__}")
        if owner is not None and owner.hparams:
            check_readable(
                owner.hparams if _is_omegaconf(owner.hparams) else None, f"hparams of {type(owner).__name__}"
            )
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            check_readable(value, f"what get_extra_state gives for {name!r}")
    if data is not None:
        check_readable(data.state_dict(), f"the state of {type(data).__name__}")
    if all(c.save_weights_only for c in savers):
        return
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        check_readable(callback.state_dict(), f"the state of {type(callback).__name__}")
    for config in trainer.lr_scheduler_configs:
        check_readable(config.scheduler.state_dict(), f"the state of {type(config.scheduler).__name__}")
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            options = _plain({name: value for name, value in group.items() if name != "params"})
            check_readable(options, f"a parameter group of {type(_unwrap(optimizer)).__name__}")


def check_state(optimizer: Optimizer | LightningOptimizer, registry: ParameterRegistry) -> None:
    """Checks after an optimizer's first step that its state can be stored.

    Raises:
        CheckpointError: If state cannot be cut like its parameter.
    """
    for name, values in optimizer_state(optimizer, registry)["state"].items():
        for value in values.values():
            _describe(value, name, registry)


def _is_omegaconf(hparams: Any) -> bool:
    return type(hparams).__module__.partition(".")[0] == "omegaconf"


def load_training_state(
    path: str | Path,
    meta: dict[str, Any],
    registry: ParameterRegistry,
    module: nn.Module,
    optimizers: Sequence[Optimizer | LightningOptimizer],
    *,
    check: bool = True,
) -> None:
    """Fills the module and the optimizers from a checkpoint saved under any fold. Collective.

    Args:
        path: The checkpoint.
        meta: Result of :func:`~.checkpoint.sharded.load_meta`; its optimizer groups are removed.
        registry: Registry of the module's parameters.
        module: The LightningModule.
        optimizers: Optimizers to fill; empty to load weights only.
        check: Whether the checksums of what is read are compared.

    Raises:
        CheckpointError: If the checkpoint does not fit the module or the optimizers.
    """
    world = registry.mesh.world
    with agreeing(world, CheckpointError):
        stored = StoredTensors(path, meta, check=check)
    adapter_runs.check_bases(path, meta, registry)
    adapter_runs.adopt_stored(registry, stored.items)
    of_base = adapter_runs.left_out(registry)
    state = {
        name: value for name, value in module.state_dict().items() if isinstance(value, Tensor) and name not in of_base
    }
    with agreeing(world, CheckpointError):  # another stage of a pipeline may hold what differs
        check_same_model(path, meta, state, {name: tuple(item.size) for name, item in stored.items.items()}, registry)
    groups = meta.pop("optimizer_groups", [])
    if optimizers and not groups:
        raise CheckpointError(
            f"{path} holds weights only, and training cannot be resumed from them; save the optimizer as well."
        )
    if optimizers and len(groups) != len(optimizers):
        raise CheckpointError(
            f"{path} holds the state of {len(groups)} optimizers, but {len(optimizers)} are configured."
        )
    _restore_placements(path, meta, registry, optimizers)
    tensors: dict[str, Tensor | TensorPiece] = {
        f"model.{name}": _describe(value, name, registry) for name, value in state.items()
    }
    fills = [
        _prepare_optimizer(i, _unwrap(o), groups[i], stored.items, registry, tensors) for i, o in enumerate(optimizers)
    ]
    with agreeing(world):
        stored.fill(tensors)
    for name, value in meta.pop("extra_state", {}).items():
        module.get_submodule(name.rpartition(".")[0]).set_extra_state(value)
    for optimizer, values in fills:
        optimizer.state.clear()
        for parameter, state in values.items():
            optimizer.state[parameter] = state


def _prepare_optimizer(
    index: int,
    optimizer: Optimizer,
    groups: list[dict[str, Any]],
    stored: dict[str, Any],
    registry: ParameterRegistry,
    tensors: dict[str, Tensor | TensorPiece],
) -> tuple[Optimizer, dict[nn.Parameter, dict[str, Tensor]]]:
    """Creates empty state of the stored shapes, and adds it to the tensors to read."""
    names = _names(optimizer, registry)
    mine = [set(g["params"]) for g in _groups(optimizer, names)]
    if [set(g["params"]) - registry.elsewhere for g in groups] != mine:
        raise CheckpointError(f"optimizer {index} {_other_groups(groups, mine, registry)}; configure it alike.")
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        group.update({k: v for k, v in saved.items() if k != "params"})
    by_name = {names[id(p)]: p for g in optimizer.param_groups for p in g["params"] if id(p) in names}
    prefix = f"optimizer.{index}."
    # As in torch.optim, step counters stay on the CPU unless a kernel on the device reads them.
    on_device = {id(p) for g in optimizer.param_groups if g.get("fused") or g.get("capturable") for p in g["params"]}
    values: dict[nn.Parameter, dict[str, Tensor]] = {}
    for full, item in stored.items():
        name, _, key = full.removeprefix(prefix).rpartition(".")
        if not full.startswith(prefix) or name not in by_name:
            continue
        parameter = by_name[name]
        if key == "step" and not item.size:
            value = torch.empty(
                (), dtype=item.properties.dtype, device=parameter.device if id(parameter) in on_device else "cpu"
            )
        else:
            value = _empty_state(parameter, tuple(item.size), item.properties.dtype)
        tensors[full] = _describe(value, name, registry)
        values.setdefault(parameter, {})[key] = value
    return optimizer, values


def _other_groups(saved: list[dict[str, Any]], mine: list[set[str]], registry: ParameterRegistry) -> str:
    """Says in what an optimizer's groups differ from those of the checkpoint."""
    if len(saved) != len(mine):
        return f"has {len(mine)} parameter groups, and the checkpoint holds the state of {len(saved)}"
    of_checkpoint = {
        name: i for i, group in enumerate(saved) for name in group["params"] if name not in registry.elsewhere
    }
    of_run = {name: i for i, group in enumerate(mine) for name in group}
    name = min(n for n in of_checkpoint | of_run if of_checkpoint.get(n) != of_run.get(n))
    if name not in of_run:
        return f"does not have {name!r}, whose state the checkpoint holds"
    if name not in of_checkpoint:
        return f"has {name!r}, which was frozen or had another optimizer when the checkpoint was saved"
    return f"has {name!r} in group {of_run[name]}, and the checkpoint in group {of_checkpoint[name]}"


def _empty_state(parameter: nn.Parameter, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if shape != tuple(parameter.shape):
        return torch.empty(shape, dtype=dtype)
    return like(parameter, torch.empty_like(local_part(parameter), dtype=dtype))

# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of runs that train an adapter: they hold what may have changed, and name the base instead of holding it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_moefold.adapters.adapter import Adapter
from lightning_moefold.adapters.config import LoRA
from lightning_moefold.agreement import agreeing
from lightning_moefold.checkpoint.sharded import MODELS
from lightning_moefold.errors import CheckpointError, InputError
from lightning_moefold.models import MoECausalLM
from lightning_moefold.parallel.parameters import ParameterRegistry


def left_out(registry: ParameterRegistry) -> set[str]:
    """Names of parameters that a checkpoint leaves to the base: those that have never been trainable."""
    return {
        f"{prefix}.{name}".lstrip(".")
        for prefix, model, adapter in _adapted(registry)
        if model.source is not None
        for name in adapter.left_out(model)
    }


def note_trained(registry: ParameterRegistry) -> None:
    """Records the trainable parameters again, because they may have changed. Collective.

    Raises:
        InputError: If one cannot train beside the adapter; PeerError on the other ranks, which may hold other stages.
    """
    if adapted := _adapted(registry):
        with agreeing(registry.mesh.world, InputError):
            for _, model, adapter in adapted:
                adapter.note_trained(model)


def check_bases(path: str | Path, meta: Mapping[str, Any], registry: ParameterRegistry) -> None:
    """Compares adapters and bases of a checkpoint with the module's.

    Raises:
        CheckpointError: If one has an adapter that the other has not, or another one, or another base.
    """
    stored = meta.get(MODELS, {})
    for prefix, model in registry.roots.items():
        if not isinstance(model, MoECausalLM) or prefix not in stored:
            continue
        theirs, ours = stored[prefix].get("adapter"), model.describe_adapter()
        if theirs is None and ours is None:
            continue
        if theirs is None or ours is None:
            have = ("none", "an adapter") if theirs is None else ("an adapter", "none")
            raise CheckpointError(
                f"{path} holds {have[0]} and the model has {have[1]}; make the model as it was for that run."
            )
        kept, made = LoRA.of(theirs["lora"]), LoRA.of(ours["lora"])
        if kept != made:
            raise CheckpointError(
                f"{path} holds the adapter {kept}, and the model has {made}; make it as it was for that run."
            )
        if theirs.get("quantize") != ours["quantize"]:
            raise CheckpointError(
                f"{path} was trained on a base with quantize={theirs.get('quantize')!r}, and the model has "
                f"quantize={ours['quantize']!r}; make it as it was for that run."
            )
        if theirs["base"] != ours["base"]:
            raise CheckpointError(
                f"{path} holds an adapter of another base than {ours['path'] or 'the one that the model was made with'}: "
                "configuration, index, tensor headers or weights differ; begin with the base of that run."
            )


def adopt_stored(registry: ParameterRegistry, stored: Mapping[str, Any]) -> None:
    """Parameters of the base that a checkpoint holds have been trainable; it will be in the next one, too."""
    for prefix, model, adapter in _adapted(registry):
        names = (name for name, _ in model.named_parameters() if name not in adapter.shapes)
        adapter.trained |= {name for name in names if f"model.{prefix}.{name}".replace("..", ".") in stored}


def _adapted(registry: ParameterRegistry) -> list[tuple[str, MoECausalLM, Adapter]]:
    models = [(prefix, part) for prefix, part in registry.roots.items() if isinstance(part, MoECausalLM)]
    return [(prefix, model, model.adapter) for prefix, model in models if model.adapter is not None]

# SPDX-License-Identifier: Apache-2.0
"""Finds the modules of a model that targets name, and adds A and B to them.

Legend: E experts.
"""

from __future__ import annotations

import hashlib

from torch import nn

from lightning_moefold.adapters.config import LoRA
from lightning_moefold.adapters.layout import MIXTRAL
from lightning_moefold.errors import InputError
from lightning_moefold.modules.base import Linear
from lightning_moefold.modules.decoder import DecoderLayer
from lightning_moefold.modules.experts.experts import Experts
from lightning_moefold.modules.routers import Router
from lightning_moefold.modules.vocabulary import VocabularyEmbedding, VocabularyHead

_ADAPTABLE = (Linear, Router, Experts)


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is A, B or the lengths of an adapter."""
    return name.rpartition(".")[2].endswith(("lora_A", "lora_B", "lora_magnitude"))


def adaptable_modules(model: nn.Module) -> dict[str, Linear | Router | Experts]:
    """Returns the modules that can have an adapter, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, _ADAPTABLE)}


def targeted(model: nn.Module, lora: LoRA) -> dict[str, Linear | Router | Experts]:
    """Returns the modules that get an adapter, by name.

    Raises:
        InputError: If a target matches no module that can have one.
    """
    modules = dict(model.named_modules())
    found: dict[str, Linear | Router | Experts] = {}
    for target in lora.targets:
        named = {name: m for name, m in modules.items() if name == target or name.endswith(f".{target}")}
        adaptable = {name: m for name, m in named.items() if isinstance(m, _ADAPTABLE)}
        if not adaptable:
            raise InputError(_refusal(target, named, modules))
        found |= adaptable
    return {name: found[name] for name in modules if name in found}


def attach(model: nn.Module, lora: LoRA) -> None:
    """Freezes all parameters, and adds A and B, not yet filled, to the modules that ``lora`` targets.

    Raises:
        InputError: If a target matches no module that can have an adapter.
    """
    places = targeted(model, lora)
    for name, place in places.items():
        _check_kind(name, place, lora)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, place in places.items():
        key = int.from_bytes(hashlib.blake2b(f"{lora.seed}:{name}".encode(), digest_size=7).digest(), "little")
        if isinstance(place, Experts):
            place.adapt(lora.gate_up_rank, lora.down_rank, lora.scale(lora.down_rank), lora.dropout, key)
        elif isinstance(place, Router):
            place.adapt(lora.rank, lora.scale(lora.rank))
        else:
            place.adapt(lora.rank, lora.scale(lora.rank), lora.dropout, lora.use_dora, key)
    if lora.dropout:
        for module in model.modules():
            if isinstance(module, DecoderLayer):
                module.count_adapter_calls()
    for module in model.modules():
        if isinstance(module, Router):
            module.bias_is_held = not lora.update_expert_bias


def is_module_in_peft(name: str, module: nn.Module) -> bool:
    """Whether PEFT adapts this as a module; what it adapts as parameters has neither dropout nor DoRA there."""
    return isinstance(module, Linear) and name.rpartition(".")[2] not in MIXTRAL


def _check_kind(name: str, place: nn.Module, lora: LoRA) -> None:
    leaf = name.rpartition(".")[2]
    if lora.use_dora and not is_module_in_peft(name, place):
        raise InputError(
            f"use_dora=True does not go with the target {leaf!r}, which PEFT adapts as a parameter; leave one of them out."
        )
    if lora.dropout and isinstance(place, Router):
        raise InputError(
            f"dropout={lora.dropout} does not go with the target {leaf!r}: a router's adapter has none, as in PEFT; use "
            "dropout=0, or leave it out."
        )


def _refusal(target: str, named: dict[str, nn.Module], modules: dict[str, nn.Module]) -> str:
    head = next((m for m in named.values() if isinstance(m, VocabularyHead)), None)
    if head is not None and head.weight is None:
        return f"{target!r} is tied to the embedding, and an adapter of one would not be the other's; leave it out of targets."
    there = ", ".join(sorted({n.rpartition(".")[2] for n, m in modules.items() if isinstance(m, _ADAPTABLE)}))
    if any(isinstance(m, (VocabularyHead, VocabularyEmbedding)) for m in named.values()):
        return f"{target!r} can have no adapter: embedding and head take none here; targets can be {there}."
    return f"no module that can have an adapter is named {target!r}; targets can be {there}."

# SPDX-License-Identifier: Apache-2.0
"""Whether a checkpoint is of the model that is to be resumed, and how the two differ if it is not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_moefold.checkpoint.sharded import MODELS
from lightning_moefold.errors import CheckpointError
from lightning_moefold.models import MoECausalLM
from lightning_moefold.models.config import NEUTRAL
from lightning_moefold.models.hf_config import written_config
from lightning_moefold.parallel import local_part
from lightning_moefold.parallel.parameters import ParameterRegistry

#: So many fields of a configuration are named.
_MOST = 3


def check_same_model(
    path: str | Path,
    meta: Mapping[str, Any],
    state: Mapping[str, Tensor],
    stored: Mapping[str, tuple[int, ...]],
    registry: ParameterRegistry,
) -> None:
    """Checks that a checkpoint holds the parameters of this module in their shapes, before anything is read.

    Fields of the configuration that differ although all shapes fit, such as the number of experts of a token, are a warning.

    Args:
        path: The checkpoint.
        meta: Result of :func:`~.checkpoint.sharded.load_meta`.
        state: Parameters and buffers that this rank will read, by name.
        stored: Shapes of the stored tensors, by name.
        registry: Registry of the module's parameters.

    Raises:
        CheckpointError: If it is of another model. The message names the fields of config.json that differ and a parameter.
    """
    held = {name.removeprefix("model."): shape for name, shape in stored.items() if name.startswith("model.")}
    missing = [name for name in state if name not in held]
    extra = [name for name in held if name not in state and name not in registry.elsewhere]
    others = [name for name, value in state.items() if name in held and held[name] != _shape(name, value, registry)]
    fields = _different_fields(meta, registry)
    some = f" ({', '.join(fields)})" if fields else ""
    if not missing and not extra and not others:
        if fields:
            rank_zero_warn(f"{path} was saved with another configuration{some}; the run goes on with that of here.")
        return
    if missing:
        what = f"it has no {missing[0]!r}"
    elif extra:
        what = f"it holds {extra[0]!r}, which the module does not have"
    else:
        name = others[0]
        what = f"its {name!r} has shape {list(held[name])}, and the module's has {list(_shape(name, state[name], registry))}"
    raise CheckpointError(f"{path} is of another model{some}: {what}; load it with the model it was saved from.")


def _shape(name: str, value: Tensor, registry: ParameterRegistry) -> tuple[int, ...]:
    layout = registry.layouts.get(name)
    return tuple(local_part(value).shape) if layout is None else tuple(layout.shape)


def _different_fields(meta: Mapping[str, Any], registry: ParameterRegistry) -> list[str]:
    """Returns the fields of the models' configurations that differ, as text, the first few."""
    saved, fields = meta.get(MODELS, {}), []
    for root, part in registry.roots.items():
        before = _flat(saved.get(root, {}).get("config", {}))
        now = _flat(written_config(part.config)) if isinstance(part, MoECausalLM) and before else {}
        fields += [
            f"{field} is {before.get(field)} there and {now.get(field)} here"
            for field in dict.fromkeys((*before, *now))
            if now and field not in NEUTRAL and before.get(field) != now.get(field)
            if not isinstance(before.get(field, now.get(field)), list)  # which follow from numbers
        ]
    return [*fields[:_MOST], *(["..."] if len(fields) > _MOST else [])]


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a configuration with the fields of its dictionaries under dotted names, such as ``rope_parameters.rope_theta``."""
    flat: dict[str, Any] = {}
    for field, value in config.items():
        inner = value if isinstance(value, Mapping) else {}
        flat |= {f"{field}.{name}": of for name, of in inner.items()} if inner else {field: value}
    return flat

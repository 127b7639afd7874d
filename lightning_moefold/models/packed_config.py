# SPDX-License-Identifier: Apache-2.0
"""``config.json`` of a packed model: that of its family, under another model type, with the widths of all experts.

``transformers`` does not know the type, so it refuses the directory instead of filling missing tensors with random numbers.
Pure Python.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning_moefold.errors import ConfigError

if TYPE_CHECKING:
    from lightning_moefold.models.config import MoEConfig

#: The model type.
PACKED = "moefold_packed"
_OWN = ("packed_model_type", "expert_widths", "shared_expert_widths")


def split_packed(raw: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the family's configuration, and the fields of :class:`~.config.MoEConfig` that hold the widths.

    Raises:
        ConfigError: If a field is missing or of another kind.
    """
    plain = {name: value for name, value in raw.items() if name not in _OWN} | {"model_type": raw.get(_OWN[0])}
    try:
        widths = tuple(tuple(of_layer) for of_layer in raw["expert_widths"])
        return plain, {"packed_widths": widths, "packed_shared_widths": tuple(raw["shared_expert_widths"])}
    except (KeyError, TypeError) as error:
        raise ConfigError(f"config.json of a packed model lacks a list of widths ({error}).") from None


def join_packed(config: MoEConfig, plain: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the ``config.json`` of a packed model; ``plain`` is that of its family."""
    kept = {name: value for name, value in plain.items() if name != "architectures"}
    return kept | {
        "model_type": PACKED,
        "packed_model_type": config.model_type,
        "expert_widths": [list(widths) for widths in config.packed_widths],
        "shared_expert_widths": list(config.packed_shared_widths),
    }

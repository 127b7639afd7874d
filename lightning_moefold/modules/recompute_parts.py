# SPDX-License-Identifier: Apache-2.0
"""The parts of a decoder layer that backward can compute again. Pure Python; the planner reads it too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast, get_args

from lightning_moefold.errors import InputError, InputTypeError

RecomputePart = Literal["norm", "attention", "expert_activation", "moe", "mlp"]
Recompute = Literal["selective", "full"] | list[RecomputePart]

PARTS: tuple[RecomputePart, ...] = get_args(RecomputePart)
#: The whole layer as one part: what ``"full"`` stands for.
LAYER = "layer"


def recompute_parts(recompute: str | Sequence[str] | None) -> frozenset[str]:
    """Returns the parts that ``recompute`` names.

    Args:
        recompute: ``"selective"``, which is attention alone; ``"full"``, which is the whole layer; parts; None for nothing.

    Raises:
        InputError: If a name is not known, comes twice, or there is none.
    """
    if recompute is None:
        return frozenset()
    if isinstance(recompute, str):
        if recompute not in ("selective", "full"):
            raise InputError(
                f"recompute={recompute!r} is not available; use None, 'selective', 'full', or a list of {', '.join(PARTS)}."
            )
        return frozenset({"attention"} if recompute == "selective" else {LAYER})
    if not isinstance(recompute, (list, tuple)):
        raise InputTypeError(
            f"recompute={recompute!r} is not available; use None, 'selective', 'full', or a list of {', '.join(PARTS)}."
        )
    if not recompute:
        raise InputError(f"recompute=[] names no part; use None, or some of {', '.join(PARTS)}.")
    for number, part in enumerate(recompute):
        if part not in PARTS:
            raise InputError(f"recompute names {part!r}, which is no part of a layer; use {', '.join(PARTS)}.")
        if part in recompute[:number]:
            raise InputError(f"recompute names {part!r} twice; name each part once.")
    return frozenset(recompute)


def parse_recompute(text: str) -> Recompute | None:
    """Reads what the planner calls a setting: ``"none"``, ``"selective"``, ``"full"``, or parts joined by commas.

    Raises:
        InputError: As :func:`recompute_parts`.
    """
    setting: Any = None if text == "none" else text if text in ("selective", "full") else text.split(",")
    recompute_parts(setting)
    return cast("Recompute | None", setting)


def recompute_text(recompute: Recompute | None) -> str:
    """Returns what the planner calls a setting; the inverse of :func:`parse_recompute`."""
    return recompute if isinstance(recompute, str) else ",".join(recompute or ["none"])


def half_is_recomputed(parts: frozenset[str], moe: bool) -> bool:
    """Whether all of a layer's feed-forward half is computed again.

    Args:
        parts: Of :func:`recompute_parts`.
        moe: Whether the layer has experts.
    """
    return LAYER in parts or ("moe" if moe else "mlp") in parts

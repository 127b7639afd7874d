# SPDX-License-Identifier: Apache-2.0
"""Checks the type and range of arguments, so that a wrong one is refused by its name. Pure Python."""

from __future__ import annotations

import math

from lightning_moefold.errors import InputError, InputTypeError


def check_choice(name: str, value: object, known: tuple[object, ...]) -> None:
    """Raises an InputError unless the value of an argument is among those that are known."""
    if not any(value is one or (type(value) is type(one) and value == one) for one in known):
        raise InputError(f"{name}={value!r} is not available; use {' or '.join(map(repr, known))}.")


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raises an InputError unless an argument is a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputTypeError(f"{name}={value!r} must be a whole number, at least {least}.")
    if value < least:
        raise InputError(f"{name}={value} must be at least {least}.")


def is_number(value: object) -> bool:
    """Whether a value is a finite real number, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

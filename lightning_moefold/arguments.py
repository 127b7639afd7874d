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


def check_number(
    name: str, value: object, least: float = 0.0, most: float = math.inf, *, above: bool = False, below: bool = False
) -> None:
    """Raises an InputError unless an argument is a finite number in a range.

    Args:
        name: Of the argument.
        value: What was given.
        least: The smallest.
        most: The largest.
        above: Whether it must be larger than ``least``.
        below: Whether it must be smaller than ``most``.
    """
    low = f"{'above' if above else 'at least'} {least:g}"
    wanted = low if most == math.inf else f"{low} and {'below' if below else 'at most'} {most:g}"
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise InputTypeError(f"{name}={value!r} must be a number, {wanted}.")
    small, large = (value <= least if above else value < least), (value >= most if below else value > most)
    if not is_number(value) or small or large:
        raise InputError(f"{name}={value} must be {wanted}.")


def is_number(value: object) -> bool:
    """Whether a value is a finite real number, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

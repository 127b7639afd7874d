# SPDX-License-Identifier: Apache-2.0
"""Compares tensors by name, with one number per tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_moefold.errors import InputError

_LISTED = 5


def relative_error(a: Tensor, b: Tensor) -> float:
    """Measures ``max|a - b| / max|b|``.

    Args:
        a: The tensor to judge.
        b: The reference, of the same shape.

    Returns:
        The error. If the reference is exactly zero, it is 0 if ``a`` is exactly zero as well, otherwise infinity. It is
        also infinite if either tensor holds a NaN or an infinity.

    Raises:
        ValueError: If the shapes differ.
    """
    if a.shape != b.shape:
        raise InputError(f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}")
    if b.numel() == 0:
        return 0.0
    a, b = a.detach().to(torch.float64), b.detach().to(torch.float64)
    difference, scale = float((a - b).abs().max()), float(b.abs().max())
    if not math.isfinite(difference) or not math.isfinite(scale):
        return math.inf
    if scale == 0.0:
        return 0.0 if difference == 0.0 else math.inf
    return difference / scale


def assert_close_by_name(
    actual: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None], tol: float, what: str
) -> float:
    """Asserts that two sets of tensors have the same names, and errors below a tolerance.

    Args:
        actual: The tensors to judge. None means that there is no tensor, as for the gradient of a frozen parameter.
        expected: The reference.
        tol: Largest :func:`relative_error` allowed.
        what: Description of the tensors, for the message.

    Returns:
        The largest error.

    Raises:
        AssertionError: If they differ; lists missing and extra names, and the worst tensors with their errors.
    """
    lines = []
    if missing := sorted(expected.keys() - actual.keys()):
        lines.append(f"missing: {', '.join(missing)}")
    if extra := sorted(actual.keys() - expected.keys()):
        lines.append(f"extra: {', '.join(extra)}")
    judged = [(*_judge(actual[name], expected[name]), name) for name in expected.keys() & actual.keys()]
    bad = [(error, name, note) for error, note, name in judged if not error <= tol]
    bad.sort(key=lambda item: (-item[0], item[1]))
    if bad:
        lines.append(f"{len(bad)} of {len(expected)} tensors differ by more than {tol:g}, the worst:")
        lines += [f"  {error:.3e}  {name}  {note}" for error, name, note in bad[:_LISTED]]
    if lines:
        raise AssertionError("\n".join([what, *lines]))
    return max((error for error, _, _ in judged), default=0.0)


def _judge(a: Tensor | None, b: Tensor | None) -> tuple[float, str]:
    """Returns the error of a pair, and a remark that helps to read it."""
    if a is None and b is None:
        return 0.0, ""
    if a is None or b is None:
        return math.inf, f"(is {'None' if a is None else 'a tensor'}, expected {'None' if b is None else 'a tensor'})"
    if a.shape != b.shape:
        return math.inf, f"(shape {tuple(a.shape)}, expected {tuple(b.shape)})"
    if b.numel() == 0:
        return 0.0, ""
    return relative_error(a, b), f"(max |expected| {float(b.detach().abs().max()):.3e})"

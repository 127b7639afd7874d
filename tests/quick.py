# SPDX-License-Identifier: Apache-2.0
"""Chooses the cases of a parametrized test that ``make test`` and ``make test-more`` run; the rest is for ``make test-all``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

EVERY = 3
"""Of this many cases that ``make test`` leaves out, ``make test-more`` runs one."""


def quick(cases: Iterable[Any], *chosen: Any) -> list[Any]:
    """Marks those of ``cases`` that are not chosen: the first of every three as ``more``, the others as ``slow``.

    Args:
        cases: Arguments of ``pytest.mark.parametrize``: values, tuples of values, or ``pytest.param``. What is marked
            ``slow`` stays slow.
        *chosen: Values of the cases that stay in ``make test``; each must be among the cases.

    Returns:
        The cases in the same order.
    """
    marked, found, others = [], [], 0
    for case in cases:
        known = hasattr(case, "marks")
        values = case.values if known else (case if isinstance(case, tuple) else (case,))
        value = values[0] if len(values) == 1 else tuple(values)
        marks, name = (case.marks, case.id) if known else ((), None)
        if value in chosen:
            found.append(value)
        elif not any(mark.name == "slow" for mark in marks):
            marks = [*marks, pytest.mark.slow if others % EVERY else pytest.mark.more]
            others += 1
        marked.append(pytest.param(*values, marks=marks, id=name))
    missing = [value for value in chosen if value not in found]
    assert not missing, f"{missing} are not among the cases"
    return marked

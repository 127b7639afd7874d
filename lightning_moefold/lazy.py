# SPDX-License-Identifier: Apache-2.0
"""Imports the public names of a package at first use (PEP 562), so that code that needs no PyTorch starts without it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Returns the functions ``__getattr__`` and ``__dir__`` of a package.

    Args:
        package: Name of the package.
        homes: For each public name, the module below the package that defines it.

    Example::

        __getattr__, __dir__ = lazy_names(__name__, {"MoELayer": "moe"})
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
        setattr(sys.modules[package], name, value)  # the next use finds it without this function
        return value

    return get, lambda: sorted({*vars(sys.modules[package]), *homes})

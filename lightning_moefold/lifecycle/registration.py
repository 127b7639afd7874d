# SPDX-License-Identifier: Apache-2.0
"""Registers the name ``moefold`` for ``Trainer(strategy=...)``, whichever of Lightning and this package is imported first."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_moefold.strategy import MoEFoldStrategy

NAME = "moefold"
_HOME = "lightning.pytorch.strategies"


def make_strategy(**arguments: Any) -> MoEFoldStrategy:
    """Makes the strategy; its modules are imported only here."""
    from lightning_moefold.strategy import MoEFoldStrategy

    return MoEFoldStrategy(**arguments)


def register() -> None:
    """Registers the strategy in Lightning, now or when Lightning is imported."""
    if _HOME in sys.modules:
        _enter(sys.modules[_HOME])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _enter(strategies: ModuleType) -> None:
    if NAME not in strategies.StrategyRegistry:
        description = "MoE Parallel Folding: separate mappings for attention and experts"
        strategies.StrategyRegistry.register(NAME, make_strategy, description=description)


class _Finder(MetaPathFinder):
    """Import hook that adds this package's strategy when Lightning's strategies are imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Returns how Lightning's strategies are found, with ours entered once they have run; None for every other module."""
        if fullname != _HOME:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_enter(module: ModuleType) -> None:
                execute(module)
                _enter(module)

            spec.loader.exec_module = execute_and_enter  # type: ignore[method-assign]
        return spec

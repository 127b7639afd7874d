# SPDX-License-Identifier: Apache-2.0
"""Our overrides take what the installed Lightning passes; the strategy can be named, and filled by LightningCLI."""

from __future__ import annotations

import inspect
import typing
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import ParallelStrategy, StrategyRegistry

import lightning_moefold
from lightning_moefold import MoEFoldStrategy
from lightning_moefold.lifecycle.checkpoints import SharedCheckpoints
from lightning_moefold.lifecycle.precision import MoEFoldPrecision
from lightning_moefold.lifecycle.ranks import FoldedRanks


def _overrides() -> list[Any]:
    strategies = ((kind, ParallelStrategy) for kind in (MoEFoldStrategy, SharedCheckpoints, FoldedRanks))
    pairs = (*strategies, (MoEFoldPrecision, Precision))
    return [
        pytest.param(getattr(ours, name), getattr(base, name), id=f"{ours.__name__}.{name}")
        for ours, base in pairs
        for name in sorted(vars(ours))
        if not name.startswith("__") and inspect.isfunction(getattr(base, name, None))
    ]


@pytest.mark.parametrize(("ours", "base"), _overrides())
def test_override_takes_what_the_base_takes(ours: Any, base: Any) -> None:
    mine, theirs = inspect.signature(ours).parameters, inspect.signature(base).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in mine.values()) and any(
        p.kind is p.VAR_POSITIONAL for p in mine.values()
    )
    for place, (name, parameter) in enumerate(theirs.items()):
        if takes_any or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        assert name in mine, f"{name} is missing"
        assert list(mine)[place] == name, f"{name} is at another place"
        if parameter.default is not parameter.empty:
            assert mine[name].default is not parameter.empty, f"{name} has lost its default"
    for name in set(mine) - set(theirs):
        extra = mine[name]
        assert extra.default is not extra.empty or extra.kind in (extra.VAR_KEYWORD, extra.VAR_POSITIONAL), (
            f"{name} is new"
        )


def test_properties_stay_properties() -> None:
    for name in (*vars(MoEFoldStrategy), *vars(SharedCheckpoints), *vars(FoldedRanks)):
        base = inspect.getattr_static(ParallelStrategy, name, None)
        if isinstance(base, property) and not name.startswith("__"):
            assert isinstance(inspect.getattr_static(MoEFoldStrategy, name), property), name


def test_name_is_registered() -> None:
    assert "moefold" in StrategyRegistry
    trainer = pl.Trainer(strategy="moefold", accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    assert isinstance(trainer.strategy, MoEFoldStrategy)
    assert not trainer._accelerator_connector.is_distributed
    trainer = pl.Trainer(strategy="moefold", accelerator="cpu", devices=2, logger=False, enable_checkpointing=False)
    assert trainer._accelerator_connector.is_distributed


def test_public_names() -> None:
    for name in lightning_moefold.__all__:
        assert getattr(lightning_moefold, name) is not None


def test_type_hints_resolve() -> None:
    hints = typing.get_type_hints(MoEFoldStrategy.__init__)
    assert set(hints) - {"return"} == set(inspect.signature(MoEFoldStrategy.__init__).parameters) - {"self"}


def test_command_line_fills_the_strategy(tmp_path: Path) -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(pl.strategies.Strategy, "strategy")
    file = tmp_path / "config.yaml"
    file.write_text(
        "strategy:\n  class_path: lightning_moefold.MoEFoldStrategy\n  init_args:\n    tensor_parallel_size: 2\n"
        "    expert_parallel_size: 4\n    num_microbatches: 2\n    data_parallel_sharding: full\n    timeout: '0:10:00'\n"
    )
    strategy = parser.instantiate_classes(parser.parse_args(["--config", str(file)])).strategy
    assert isinstance(strategy, MoEFoldStrategy)
    assert (strategy._sizes, strategy.settings.num_microbatches) == ((2, 1, 1, 4, 1), 2)
    assert (strategy.settings.sharding.mode, strategy._timeout) == ("full", timedelta(minutes=10))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fold": "tp2", "expert_parallel_size": 2}, "use one or the other"),
        ({"num_microbatches": 0}, "at least 1"),
        ({"dispatcher": "pigeon"}, "use 'alltoall'"),
        ({"data_parallel_sharding": "half"}, "use 'optimizer' or 'full'"),
    ],
)
def test_arguments_that_contradict(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoEFoldStrategy(**arguments)


def test_the_fold_is_not_known_before_the_start() -> None:
    with pytest.raises(RuntimeError, match="inside a hook"):
        _ = MoEFoldStrategy().fold

# SPDX-License-Identifier: Apache-2.0
"""Training with compiled layers beside training without, in the ranks of a pool."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._dynamo.utils import counters

import lightning_moefold.strategy as strategy
from lightning_moefold.parallel import apply, compiling
from tests.exactness import runs


def train(path: str, fold: str, batches: list[list[dict[str, torch.Tensor]]], spec: dict[str, Any]) -> dict[str, Any]:
    """A run under ``aot_eager``, which changes no bit, and what it compiled."""
    torch._dynamo.reset()
    counters.clear()
    said: list[str] = []
    compile_layers = compiling.compile_layers

    def listen(*args: Any) -> str:
        said.append(compile_layers(*args))
        return said[-1]

    try:
        with (
            mock.patch.object(strategy, "COMPILER", "aot_eager"),
            mock.patch.object(apply, "compile_layers", listen),
        ):
            run = runs.train(path, fold, batches, spec)
        graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
        recompiled = len(torch._dynamo.utils.compile_times(repr="csv", aggregate=False)[0])
        return {"run": run, "graphs": graphs, "breaks": breaks, "said": said, "times": recompiled}
    finally:
        torch._dynamo.reset()


def beside(path: str, folds: list[str], batches: dict[int, Any], spec: dict[str, Any]) -> list[tuple[Any, Any]]:
    """Each fold without and with ``compile=True``; batches by the size of dp."""
    found = []
    for fold in folds:
        data = batches[1 if "tp2" in fold or "pp2" in fold else 2]
        pipeline = {"pipeline_schedule": "1f1b"} if "pp2" in fold else {}
        case = {**spec, "num_microbatches": 2} if pipeline else spec
        plain, compiled = (
            train(path, fold, data, {**case, "pipeline": {**case.get("pipeline", {}), **pipeline, "compile": wanted}})
            for wanted in (False, True)
        )
        found.append((plain, compiled))
    return found


def without_a_compiler(path: str, batches: list[Any], folder: str) -> tuple[list[str], int, list[float]]:
    """What a run says and does where no compiler is found."""
    Path(folder).mkdir(exist_ok=True)
    counters.clear()
    with (
        mock.patch.dict("os.environ", {"PATH": folder}),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        run = runs.train(path, "", batches, {"pipeline": {"compile": True}})
    said = [str(w.message) for w in caught if "compile=True" in str(w.message)]
    return said, counters["stats"]["unique_graphs"], run.losses

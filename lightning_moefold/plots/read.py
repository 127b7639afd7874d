# SPDX-License-Identifier: Apache-2.0
"""What a run has left in its folder: ``metrics.csv`` of Lightning, ``expert_load.npz`` and ``pipeline_timeline.json`` of callbacks.

Legend: N intervals, L MoE layers, E experts.
"""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from lightning_moefold.errors import InputError
from lightning_moefold.planner.cost.simulate import Event, Timeline
from lightning_moefold.plots.files import EXPERT_LOAD, NO_EXPERT, PIPELINE_TIMELINE

METRICS_NAME = "metrics.csv"
NEWEST = 4
"""Versions of a run that are read; a picture of more has too many lines."""


@dataclass(frozen=True)
class Series:
    """One metric of one version of a run.

    Args:
        steps: Optimizer steps made, from 1 on; rising.
        values: What was logged first at each step; finite.
        left_out: Values that were not finite.
    """

    steps: NDArray[np.float64]
    values: NDArray[np.float64]
    left_out: int = 0


@dataclass(frozen=True)
class RecordedLoad:
    """Expert loads over a run.

    Args:
        steps: Optimizer step with which each interval ended, ``[N]``.
        layers: Number of each layer, ``[L]``.
        counts_NLE: How often each expert was chosen; negative where a layer has no such expert.
    """

    steps: NDArray[np.int64]
    layers: NDArray[np.int64]
    counts_NLE: NDArray[np.int64]

    def shares(self) -> NDArray[np.float64]:
        """Load of each expert over the mean of its layer, ``[N, L, E]``; NaN without load, and where no expert is."""
        counts = np.where(self.counts_NLE == NO_EXPERT, np.nan, self.counts_NLE.astype(np.float64))
        experts = np.isfinite(counts).sum(-1, keepdims=True)
        total = np.nansum(counts, axis=-1, keepdims=True)
        return np.divide(counts * experts, total, out=np.full_like(counts, np.nan), where=total > 0)


@dataclass
class Run:
    """All that was found.

    Args:
        folder: The run's.
        versions: Metrics by name for each version of the run (a folder with a ``metrics.csv``), oldest first.
        load: The latest record of expert loads.
        timeline: The latest record of a pipeline.
        notes: What a reader should know about the files, each in a sentence.
    """

    folder: Path
    versions: dict[str, dict[str, Series]] = field(default_factory=dict)
    load: RecordedLoad | None = None
    timeline: Timeline | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The folder's name and its parent's."""
        return "/".join(self.folder.resolve().parts[-2:])

    def having(self, name: str) -> dict[str, Series]:
        """A metric of each version that has it."""
        return {label: metrics[name] for label, metrics in self.versions.items() if name in metrics}

    def names(self) -> list[str]:
        """All metrics of all versions."""
        return sorted({name for metrics in self.versions.values() for name in metrics})


def read_run(folder: str | Path) -> Run:
    """Finds and reads the files of a run, in ``folder`` or anywhere below it.

    Raises:
        ValueError: If there is no such folder, or nothing in it that can be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is no directory; give the one in which a run has written its logs.")
    run = Run(folder)
    _read_versions(run)
    _read_load(run)
    _read_timeline(run)
    if not run.versions and run.load is None and run.timeline is None:
        reason = " ".join(run.notes) or (
            f"{folder} holds neither a {METRICS_NAME} (written by Lightning's CSVLogger) nor an {EXPERT_LOAD} (by "
            f"LoadBalanceMonitor) nor a {PIPELINE_TIMELINE} (by PipelineTimeline)."
        )
        raise InputError(reason)
    return run


def _read_versions(run: Run) -> None:
    files = sorted(run.folder.rglob(METRICS_NAME), key=lambda path: path.stat().st_mtime)
    if len(files) > NEWEST:
        run.notes.append(f"{len(files)} versions were found; the pictures show the newest {NEWEST}.")
    for path in files[-NEWEST:]:
        label = str(path.parent.relative_to(run.folder))
        try:
            metrics = read_metrics(path)
        except (ValueError, csv.Error) as error:
            run.notes.append(f"{path} is left out: {error}")
            continue
        if metrics:
            run.versions[run.folder.name if label == "." else label] = metrics
        for name, series in metrics.items():
            if series.left_out:
                run.notes.append(f"{name} in {path} has {series.left_out} values that are not finite and not shown.")


def read_metrics(path: Path) -> dict[str, Series]:
    """The metrics in a file of Lightning's CSVLogger by name; those without any finite value are left out.

    Lightning calls the first optimizer step 0; here, as in all that is printed, it is step 1. A metric may be logged
    twice at a step, as when a model is validated once more after training; the first counts.

    Raises:
        ValueError: If it is no such file.
    """
    found: dict[str, dict[float, float]] = {}
    left_out: dict[str, int] = {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if rows.fieldnames is None or "step" not in rows.fieldnames:
            raise InputError("it has no column named step.")
        for row in rows:
            step = _number(row.pop("step"))
            for name, text in row.items():
                value = _number(text)
                if name is None or value is None or step is None:
                    continue
                if math.isfinite(value):
                    found.setdefault(name, {}).setdefault(step + 1, value)
                else:
                    left_out[name] = left_out.get(name, 0) + 1
    metrics = {}
    for name, values in found.items():
        steps = sorted(values)
        metrics[name] = Series(np.array(steps), np.array([values[step] for step in steps]), left_out.pop(name, 0))
    return metrics


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except (TypeError, ValueError):
        return None


def _read_load(run: Run) -> None:
    files = sorted(run.folder.rglob(EXPERT_LOAD), key=lambda path: path.stat().st_mtime)
    if not files:
        return
    try:
        with np.load(files[-1], allow_pickle=False) as saved:
            load = RecordedLoad(saved["steps"], saved["layers"], saved["counts"])
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        run.notes.append(f"{files[-1]} is left out: it is not what LoadBalanceMonitor writes ({error}).")
        return
    if load.counts_NLE.ndim == 3 and load.counts_NLE.size:
        run.load = load


def read_timeline(path: Path) -> Timeline:
    """A pipeline from a Chrome trace, as :func:`~lightning_moefold.planner.cost.simulate.write_chrome_trace` writes it.

    Raises:
        ValueError: If it is no such file.
    """
    try:
        rows = json.loads(path.read_text())["traceEvents"]
        events = [
            Event(row["tid"], (row["cat"], row["args"]["stage"], row["args"]["micro-batch"]), row["ts"] / 1e6,
                  (row["ts"] + row["dur"]) / 1e6)
            for row in rows if row["ph"] == "X"
        ]  # fmt: skip
        ranks = sum(row["ph"] == "M" for row in rows)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"it is no trace of a pipeline ({type(error).__name__}: {error}).") from error
    if not events or ranks <= max(event.rank for event in events):
        raise InputError("it holds no passes, or of ranks that it does not name.")
    return Timeline(tuple(events), ranks)


def _read_timeline(run: Run) -> None:
    files = sorted(run.folder.rglob(PIPELINE_TIMELINE), key=lambda path: path.stat().st_mtime)
    if not files:
        return
    try:
        run.timeline = read_timeline(files[-1])
    except (OSError, ValueError) as error:
        run.notes.append(f"{files[-1]} is left out: {error}")

# SPDX-License-Identifier: Apache-2.0
"""Reads the files of a run: Lightning's ``metrics.csv``, and ``expert_load.npz`` and ``pipeline_timeline.json`` of callbacks.

Legend: N intervals, L MoE layers, E experts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from lightning_moefold.errors import DAMAGE, InputError
from lightning_moefold.planner.cost.simulate import Event, Timeline
from lightning_moefold.plots.files import EXPERT_LOAD, EXPERT_PLACEMENT, PIPELINE_TIMELINE
from lightning_moefold.plots.style import fair_shares
from lightning_moefold.plots.versions import METRICS_NAME, Series, find_versions, name_versions

T = TypeVar("T")


@dataclass(frozen=True)
class RecordedLoad:
    """Recorded expert loads of a run.

    Args:
        steps: Optimizer step at which each interval ended, ``[N]``.
        layers: Number of each layer, ``[L]``.
        counts_NLE: How often each expert was chosen; negative if a layer has fewer experts.
    """

    steps: NDArray[np.int64]
    layers: NDArray[np.int64]
    counts_NLE: NDArray[np.int64]

    def shares(self) -> NDArray[np.float64]:
        """Returns the load of each expert over its layer's mean, ``[N, L, E]``; NaN if there is no load or no such expert."""
        return fair_shares(self.counts_NLE)


@dataclass(frozen=True)
class RecordedPlacement:
    """Where the experts of a run lived, and what each rank computed.

    Args:
        first: Optimizer step with which the first interval began.
        steps: Optimizer step at which each interval ended, ``[N]``.
        layers: Number of each layer, ``[L]``.
        parts_NLE: Rank of ep that each expert was on; negative if a layer has fewer experts.
        home_NLP: Rows that each rank of ep would have computed if every expert had stayed where a run begins.
        rows_NLP: Rows that it has computed.
    """

    first: int
    steps: NDArray[np.int64]
    layers: NDArray[np.int64]
    parts_NLE: NDArray[np.int16]
    home_NLP: NDArray[np.int64]
    rows_NLP: NDArray[np.int64]


@dataclass
class Run:
    """The files of a run, as read.

    Args:
        folder: Folder of the run.
        name: What titles call it; by default its folder's name and the parent folder's.
        versions: Metrics by name of each version of the run (a folder with a ``metrics.csv``), oldest first.
        load: The latest recorded expert loads, if any.
        load_from: Folder of their file.
        placement: The latest recorded placement of experts, if any.
        timeline: The latest recorded pipeline, if any.
        notes: Remarks about the files to print, one sentence each.
    """

    folder: Path
    name: str = ""
    versions: dict[str, dict[str, Series]] = field(default_factory=dict)
    load: RecordedLoad | None = None
    load_from: Path | None = None
    placement: RecordedPlacement | None = None
    timeline: Timeline | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The name of the run."""
        return self.name or "/".join(self.folder.resolve().parts[-2:])

    @property
    def load_title(self) -> str:
        """The name of the version whose expert loads are drawn, if there are several."""
        if self.load_from is None or len(self.versions) < 2:
            return self.title
        return "/".join(self.load_from.resolve().parts[-2:])

    def having(self, name: str) -> dict[str, Series]:
        """Returns a metric of each version that has it."""
        return {label: metrics[name] for label, metrics in self.versions.items() if name in metrics}

    def names(self) -> list[str]:
        """Returns the names of all metrics of all versions."""
        return sorted({name for metrics in self.versions.values() for name in metrics})


def read_run(folder: str | Path) -> Run:
    """Finds and reads the files of a run, in ``folder`` or anywhere below it.

    Raises:
        ValueError: If the folder does not exist or holds no file that can be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is no directory; give the one in which a run has written its logs.")
    run = Run(folder)
    found = [version for _, version in find_versions([folder], run.notes)]
    run.versions = dict(zip(name_versions(found), (version.metrics for version in found), strict=True))
    _read_load(run)
    _read_placement(run)
    _read_timeline(run)
    if not run.versions and run.load is None and run.placement is None and run.timeline is None:
        reason = " ".join(run.notes) or (
            f"{folder} holds neither a {METRICS_NAME} (written by Lightning's CSVLogger) nor an {EXPERT_LOAD} (by "
            f"LoadBalanceMonitor) nor a {PIPELINE_TIMELINE} (by PipelineTimeline)."
        )
        raise InputError(reason)
    return run


def read_runs(folders: Sequence[Path]) -> Run:
    """Reads several runs to compare: the newest version of each. Expert loads and pipeline are those of the last folder.

    A run from which another of them goes on is joined with it.

    Raises:
        ValueError: If a folder does not exist or holds no file that can be read.
    """
    runs = [read_run(folder) for folder in folders]
    notes = [note for run in runs for note in run.notes]
    newest = find_versions(folders, [], most=1)
    names = name_versions([version for _, version in newest], [folder for folder, _ in newest])
    versions = dict(zip(names, (version.metrics for _, version in newest), strict=True))
    last = runs[-1]
    title = ", ".join(name.partition(" (")[0] for name in names)
    return Run(last.folder, title, versions, last.load, last.load_from, last.placement, last.timeline, notes)


def _read_load(run: Run) -> None:
    def read(saved: Any) -> RecordedLoad:
        return RecordedLoad(saved["steps"], saved["layers"], saved["counts"])

    load, file = _read_newest(run, EXPERT_LOAD, "LoadBalanceMonitor", read)
    if load is not None and file is not None and load.counts_NLE.ndim == 3 and load.counts_NLE.size:
        run.load, run.load_from = load, file.parent


def _read_placement(run: Run) -> None:
    def read(saved: Any) -> RecordedPlacement:
        arrays = (saved[name] for name in ("steps", "layers", "parts", "home_rows", "rows"))
        return RecordedPlacement(int(saved["first"]), *arrays)

    placement, _ = _read_newest(run, EXPERT_PLACEMENT, "ExpertRebalancer", read)
    if placement is not None and len(placement.steps):
        run.placement = placement


def _read_newest(run: Run, name: str, writer: str, read: Callable[[Any], T]) -> tuple[T | None, Path | None]:
    """Reads the newest file of a name; None without one, or where it is damaged, which a note then says."""
    if (file := _newest(run, name)) is None:
        return None, None
    try:
        with np.load(file, allow_pickle=False) as saved:
            return read(saved), file
    except DAMAGE as error:
        run.notes.append(f"{file} is left out: it is not what {writer} writes ({error}).")
        return None, file


def _newest(run: Run, name: str) -> Path | None:
    return max(run.folder.rglob(name), key=lambda path: path.stat().st_mtime, default=None)


def read_timeline(path: Path) -> Timeline:
    """Reads a pipeline from a file with a :func:`~lightning_moefold.planner.cost.simulate.chrome_trace`.

    Raises:
        ValueError: If the file has another format.
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
    if (file := _newest(run, PIPELINE_TIMELINE)) is None:
        return
    try:
        run.timeline = read_timeline(file)
    except (OSError, ValueError) as error:
        run.notes.append(f"{file} is left out: {error}")

# SPDX-License-Identifier: Apache-2.0
"""The metrics of each version of a run: which are drawn, which go on from others, and what they are called.

A version is a folder with a ``metrics.csv`` of Lightning's CSVLogger. A start that logged nothing is left out, and a version that
``moefold fit --ckpt_path`` resumed, which its ``config.yaml`` says, is joined with the one it goes on from.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_moefold.errors import InputError

METRICS_NAME = "metrics.csv"
NEWEST = 4
"""Versions of a run that are drawn; a picture of more has too many lines."""
#: Settings that say where things are, not what a run is.
_PLACES = ("ckpt_path", "default_root_dir", "dirpath", "cache_dir", "predictions", "save_dir", "version")
#: So many settings that differ are named in a legend.
_MOST_SETTINGS = 2


@dataclass(frozen=True)
class Series:
    """One metric of one version of a run.

    Args:
        steps: Optimizer steps, counted from 1, in ascending order.
        values: First finite value logged at each step.
        left_out: Number of values that were not finite.
    """

    steps: NDArray[np.float64]
    values: NDArray[np.float64]
    left_out: int = 0


@dataclass(frozen=True)
class Version:
    """One version of a run.

    Args:
        folder: Folder of its ``metrics.csv``.
        metrics: Its metrics by name; with those of the versions from which it goes on.
        settings: Its configuration, flat: ``{"model.init_args.learning_rate": 0.001}``.
        chain: Folders of the versions from which it goes on, the first one first.
    """

    folder: Path
    metrics: dict[str, Series]
    settings: dict[str, Any] = field(default_factory=dict)
    chain: tuple[Path, ...] = ()


def find_versions(folders: Sequence[Path], notes: list[str], most: int = NEWEST) -> list[tuple[Path, Version]]:
    """Reads the newest versions below each folder that have logged anything.

    Args:
        folders: Folders of runs. A version of one may go on from a version of another, and is then joined with it.
        notes: Where remarks about the files go, one sentence each.
        most: How many versions to read of each.

    Returns:
        Versions with their folder of ``folders``, in its order, the oldest of each first.
    """
    files = {folder: _by_age(folder) for folder in folders}
    everywhere = [path.parent for found in files.values() for path in found]
    read: dict[Path, Version] = {}
    joined: set[Path] = set()

    def reading(place: Path) -> Version:
        if place not in read:
            read[place] = Version(place, _metrics(place / METRICS_NAME, notes), read_settings(place))
        return read[place]

    chosen: list[tuple[Path, Version]] = []
    for folder in folders[::-1]:
        found: list[Version] = []
        for path in files[folder]:
            if len(found) == most:
                break
            version = reading(path.parent)
            if path.parent in joined or not version.metrics:
                continue
            while (parent := _parent(version, everywhere)) is not None:
                joined.add(parent)
                version = _join(reading(parent), version)
            found.append(version)
        left = [p for p in files[folder] if p.parent not in joined and (p.parent not in read or read[p.parent].metrics)]
        if len(left) > most > 1:
            notes.append(f"{len(left)} versions were found; the pictures show the newest {most}.")
        chosen += [(folder, version) for version in found]
    return chosen[::-1]


def _by_age(folder: Path) -> list[Path]:
    """Returns the files of metrics below a folder, the newest first."""
    return sorted(folder.rglob(METRICS_NAME), key=lambda path: path.stat().st_mtime, reverse=True)


def _metrics(path: Path, notes: list[str]) -> dict[str, Series]:
    try:
        metrics = read_metrics(path)
    except (ValueError, csv.Error) as error:
        notes.append(f"{path} is left out: {error}")
        return {}
    for name, series in metrics.items():
        if series.left_out:
            notes.append(f"{name} in {path} has {series.left_out} values that are not finite and not shown.")
    return metrics


def _parent(version: Version, places: Sequence[Path]) -> Path | None:
    """Returns the folder of the version whose checkpoint this one resumes from: one of the places, or another that still exists.

    A validation of a checkpoint is not a resumed run: its metrics are logged at the first step.
    """
    given = version.settings.get("ckpt_path")
    if min(series.steps[0] for series in version.metrics.values()) <= 1:
        return None
    above = list(Path(given).absolute().parents) if isinstance(given, str) else []
    known = {folder.absolute() for folder in (version.folder, *version.chain)}
    candidates = [*(place for place in places if place.absolute() in above), *above]
    return next((p for p in candidates if p.absolute() not in known and (p / METRICS_NAME).is_file()), None)


def _join(first: Version, then: Version) -> Version:
    """Joins a version with one that goes on from it: what the first logged after the step of the checkpoint was computed again."""
    start = min((series.steps[0] for series in then.metrics.values()), default=0)
    metrics = dict(then.metrics)
    for name, series in first.metrics.items():
        kept, more = series.steps < start, then.metrics.get(name, Series(np.empty(0), np.empty(0)))
        steps = np.concatenate([series.steps[kept], more.steps])
        values = np.concatenate([series.values[kept], more.values])
        if len(steps):
            metrics[name] = Series(steps, values, series.left_out + more.left_out)
    settings = {**then.settings, "ckpt_path": first.settings.get("ckpt_path")}
    return Version(then.folder, metrics, settings, (first.folder, *then.chain))


def read_metrics(path: Path) -> dict[str, Series]:
    """Reads the metrics in a file of Lightning's CSVLogger by name; metrics without any finite value are left out.

    Lightning calls the first optimizer step 0; here, and in everything that is printed, it is step 1. If a metric was
    logged twice at a step, for example by a validation after training, the first value counts.

    Raises:
        ValueError: If the file has another format.
    """
    found: dict[str, dict[float, float]] = {}
    left_out: dict[str, int] = {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if rows.fieldnames is None:
            return {}  # a start that failed
        if "step" not in rows.fieldnames:
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


def read_settings(folder: Path) -> dict[str, Any]:
    """Returns the configuration of a version, flat; empty if there is none that can be read."""
    import yaml

    for name in ("config.yaml", "hparams.yaml"):
        try:
            content = yaml.safe_load((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            continue
        if isinstance(content, dict) and content:
            return _flat(content)
    return {}


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {key: value}
    return {k: v for name, part in value.items() for k, v in _flat(part, f"{key}.{name}".lstrip(".")).items()}


def name_versions(versions: Sequence[Version], places: Sequence[Path] | None = None) -> list[str]:
    """Returns the names of versions for legends: what differs in their paths, and the settings that differ, if they are few.

    Args:
        versions: The versions.
        places: The folders that the user gave, one for each version; by default those of the versions.
    """
    parts = [
        [p for p in place.absolute().parts if p != "lightning_logs"] for place in places or [v.folder for v in versions]
    ]
    if len(parts) > 1:
        parts = [own[len(os.path.commonprefix(parts)) :] for own in parts]
        ends = min(len(os.path.commonprefix([own[::-1] for own in parts])), min(map(len, parts)) - 1)
        parts = [own[: len(own) - ends] if ends > 0 else own for own in parts]
    names = ["/".join(own) or version.folder.name for own, version in zip(parts, versions, strict=True)]
    names = [name if len(parts) > 1 else version.folder.name for name, version in zip(names, versions, strict=True)]
    notes = [_differences(version, versions) for version in versions]
    for version, note in zip(versions, notes, strict=True):
        note += [f"resumed from {' and '.join(place.name for place in version.chain)}"] if version.chain else []
    return [f"{name} ({', '.join(note)})" if note else name for name, note in zip(names, notes, strict=True)]


def _differences(version: Version, versions: Sequence[Version]) -> list[str]:
    """Returns the settings of a version that are not the same in all, ``learning_rate 0.001``; none if they are many."""
    keys = dict.fromkeys(key for v in versions for key in v.settings)
    differing = [
        key
        for key in keys
        if key.rpartition(".")[2] not in _PLACES and not key.startswith(("trainer.callbacks", "trainer.logger"))
        if any(v.settings.get(key) != version.settings.get(key) for v in versions)
    ]
    if len(differing) > _MOST_SETTINGS or not all(v.settings for v in versions):
        return []
    return [f"{key.rpartition('.')[2]} {version.settings.get(key)}" for key in differing]

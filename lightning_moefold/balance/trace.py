# SPDX-License-Identifier: Apache-2.0
"""Recorded routing: how often each expert was chosen, by iteration, layer and source rank.

These formats can be read:

- ``.npz`` with ``counts`` ``[N, L, E]`` or ``[N, L, S, E]`` and, optionally, ``iterations`` ``[N]`` (or ``steps``, as
  LoadBalanceMonitor calls them): what :class:`~lightning_moefold.callbacks.RoutingTraceRecorder` writes.
- ``.json``: such counts as lists, or under the key ``counts``.
- ``.npz`` with ``expert_ids`` ``[tokens, L, K]``: the experts that each token chose in each layer, as vLLM returns
  them. Equal windows of tokens are treated as iterations.
- ``.jsonl``, or a directory with one per rank: Megatron-Core's routing trace, with one line per step and layer with
  ``step``, ``layer`` and ``top_indices``.
- a directory of ``.parquet`` files, one per layer in the order of the numbers in their names, with a column ``indices``: the
  experts that each token chose, the same token in the same row of every file, as FLAME-MoE's traces have it.

Legend: N iterations, L MoE layers, S source ranks, E experts, K choices of a token.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_moefold.balance.assignment import Counts
from lightning_moefold.errors import DAMAGE, InputError

#: Number of tokens in a window of a table of expert ids.
WINDOW = 8192
#: Experts that no model reaches; a number beyond is damage.
_MOST = 1 << 20


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """The routing counts of a run.

    Args:
        iterations_N: Optimizer step of each record, in ascending order.
        counts_NLSE: Number of rows of each expert.
        name: Name of the trace's source.
        hidden_size: Hidden size of the recorded model; None if unknown.
        expert_width: Width of its experts; None if unknown.

    Raises:
        InputError: If the shapes do not match, a count is negative, or iterations do not ascend.
    """

    iterations_N: Counts
    counts_NLSE: Counts
    name: str = "trace"
    hidden_size: int | None = None
    expert_width: int | None = None

    def __post_init__(self) -> None:
        counts, iterations = self.counts_NLSE, self.iterations_N
        if counts.ndim != 4 or 0 in counts.shape:
            raise InputError(
                f"{self.name}: counts have the shape {counts.shape}; give [iterations, layers, experts] or "
                "[iterations, layers, source ranks, experts]."
            )
        if iterations.shape != counts.shape[:1]:
            raise InputError(f"{self.name}: {len(counts)} counts need as many iterations, got {iterations.shape}.")
        if (counts < 0).any():
            raise InputError(f"{self.name}: a count is negative; layers must all have the same number of experts.")
        if (np.diff(iterations) <= 0).any():
            raise InputError(f"{self.name}: iterations must rise from record to record.")

    @property
    def layers(self) -> int:
        """L."""
        return self.counts_NLSE.shape[1]

    @property
    def experts(self) -> int:
        """E."""
        return self.counts_NLSE.shape[3]

    def for_sources(self, sources: int) -> RoutingTrace:
        """Converts the trace to another number of source ranks.

        If more ranks were recorded, neighbouring ranks are added; if fewer were, each rank's rows are divided evenly.
        """
        counts = self.counts_NLSE
        recorded = counts.shape[2]
        if recorded % sources:
            if sources % recorded:
                counts, recorded = counts.sum(2, keepdims=True), 1
            each, more = np.divmod(counts, sources // recorded)
            ranks = np.arange(sources // recorded)[:, None]
            counts = (each[:, :, :, None] + (ranks < more[:, :, :, None])).reshape(*counts.shape[:2], sources, -1)
        else:
            counts = counts.reshape(*counts.shape[:2], sources, recorded // sources, -1).sum(3)
        return RoutingTrace(self.iterations_N, counts, self.name, self.hidden_size, self.expert_width)


def read_trace(path: str | Path, num_experts: int | None = None, window: int = WINDOW) -> RoutingTrace:
    """Reads a trace of any of the module's formats.

    Args:
        path: File, or directory of ``.jsonl`` or ``.parquet`` files.
        num_experts: Number of experts E, for formats that list only chosen experts; by default one more than the
            largest id.
        window: Number of tokens per record, for a table of expert ids.

    Raises:
        InputError: If the file is missing or has another format.
    """
    file = Path(path)
    if file.is_dir():
        layers = sorted(
            file.glob("*.parquet"), key=lambda layer: ([int(n) for n in re.findall(r"\d+", layer.stem)], layer.name)
        )
        if layers:
            return _from_ids(_read_parquet(layers), file, num_experts, window)
        return _read_jsonl(sorted(file.glob("*.jsonl")), file, num_experts)
    if not file.is_file():
        raise InputError(f"{file} does not exist; give the file of a routing trace (.npz, .json or .jsonl).")
    try:
        if file.suffix == ".jsonl":
            return _read_jsonl([file], file, num_experts)
        if file.suffix == ".json":
            raw = json.loads(file.read_text())
            return _from_arrays({"counts": np.asarray(raw["counts"] if isinstance(raw, dict) else raw)}, file)
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as saved:
                arrays = {name: saved[name] for name in saved.files}
            if "expert_ids" in arrays:
                return _from_ids(arrays["expert_ids"], file, num_experts, window)
            return _from_arrays(arrays, file)
    except DAMAGE as error:
        if isinstance(error, InputError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{file} is no routing trace ({type(error).__name__}: {reason}).") from None
    raise InputError(f"{file} is no routing trace; what can be read ends in .npz, .json or .jsonl.")


def _from_arrays(arrays: dict[str, NDArray[Any]], file: Path) -> RoutingTrace:
    if "counts" not in arrays:
        raise InputError(
            f"{file} has neither an array 'counts' nor 'expert_ids'; it has {', '.join(arrays) or 'none'}."
        )
    counts = arrays["counts"]
    if counts.dtype.kind not in "iu" and not (counts.dtype.kind == "f" and (counts == np.floor(counts)).all()):
        raise InputError(f"{file}: counts must be whole numbers, got {counts.dtype}.")
    counts = counts.astype(np.int64)
    if counts.ndim == 3:
        counts = counts[:, :, None]
    iterations = arrays.get("iterations", arrays.get("steps", np.arange(len(counts)))).astype(np.int64)
    sizes = [int(arrays[name]) if name in arrays else None for name in ("hidden_size", "expert_width")]
    return RoutingTrace(iterations, counts, file.name, *sizes)


def _from_ids(ids: NDArray[Any], file: Path, num_experts: int | None, window: int) -> RoutingTrace:
    if ids.ndim != 3 or ids.dtype.kind not in "iu" or not ids.size:
        raise InputError(f"{file}: expert_ids must be whole numbers [tokens, layers, k], got {ids.dtype} {ids.shape}.")
    if window < 1:
        raise InputError(f"a window of {window} tokens holds none; give at least 1.")
    experts = _experts(int(ids.max()), num_experts, file)
    records = max(1, len(ids) // window)
    counts = np.stack(
        [
            np.stack([_count(part[:, layer].ravel(), experts, file) for layer in range(ids.shape[1])])
            for part in np.array_split(ids, records)
        ]
    )
    return RoutingTrace(np.arange(records), counts[:, :, None], file.name)


def _read_parquet(layers: list[Path]) -> NDArray[Any]:
    """Reads the experts of each token, ``[tokens, L, K]``."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{layers[0]} is read with pyarrow; pip install 'lightning-moefold[data]'.") from None
    tables: list[NDArray[Any]] = []
    for file in layers:
        try:
            column = pyarrow.parquet.read_table(file, columns=["indices"])["indices"].combine_chunks()
            tables.append(np.asarray(column.flatten()).reshape(len(column), -1))
        except (pyarrow.ArrowException, OSError, KeyError, ValueError, AttributeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"{file} has no column 'indices' with as many experts for every token ({reason})."
            ) from None
        if tables[-1].shape != tables[0].shape:
            raise InputError(
                f"{file} holds {tables[-1].shape[0]} tokens with {tables[-1].shape[1]} experts each, and {layers[0].name} "
                f"{tables[0].shape[0]} with {tables[0].shape[1]}; give one file for each layer, of the same tokens."
            )
    return np.stack(tables, axis=1)


def _read_jsonl(files: list[Path], where: Path, num_experts: int | None) -> RoutingTrace:
    """Reads Megatron-Core's lines; each file is a source rank. Lines of the same step and layer (micro-batches) are added."""
    if not files:
        raise InputError(
            f"{where} holds no .jsonl or .parquet file; give the directory of a routing trace, or one of its files."
        )
    chosen: dict[tuple[int, int, int], list[NDArray[np.int64]]] = {}
    for source, file in enumerate(files):
        for number, line in enumerate(file.read_text().splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                key = (int(row["step"]), int(row["layer"]), source)
                chosen.setdefault(key, []).append(np.asarray(row["top_indices"], dtype=np.int64).ravel())
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"{file}, line {number}: it needs step, layer and top_indices ({type(error).__name__}: {error})."
                ) from None
    if not chosen:
        raise InputError(f"{where} holds no line.")
    steps, layers = (sorted({key[axis] for key in chosen}) for axis in (0, 1))
    missing = len(steps) * len(layers) * len(files) - len(chosen)
    if missing:
        raise InputError(f"{where}: {missing} pairs of a step and a layer are missing on some rank; record them all.")
    experts = _experts(max(int(ids.max(initial=-1)) for rows in chosen.values() for ids in rows), num_experts, where)
    counts = np.zeros((len(steps), len(layers), len(files), experts), dtype=np.int64)
    for (step, layer, source), rows in chosen.items():
        counts[steps.index(step), layers.index(layer), source] = _count(np.concatenate(rows), experts, where)
    return RoutingTrace(np.asarray(steps), counts, where.name)


def _experts(largest: int, num_experts: int | None, where: Path) -> int:
    if num_experts is not None and largest >= num_experts:
        raise InputError(f"{where}: expert {largest} is chosen, but the model has {num_experts} experts.")
    if num_experts is None and largest >= _MOST:
        raise InputError(f"{where}: expert {largest} is chosen, which is no expert of a model; say how many it has.")
    return largest + 1 if num_experts is None else num_experts


def _count(ids: NDArray[Any], experts: int, where: Path) -> Counts:
    """Counts the rows of each expert; -1 marks padding."""
    ids = ids[ids != -1]
    if (ids < -1).any():
        raise InputError(f"{where}: an expert id is below -1, which marks padding.")
    return np.bincount(ids, minlength=experts).astype(np.int64)

# SPDX-License-Identifier: Apache-2.0
"""What a part of the GPU script finds, written to a file after every try, so that a crash or a hang loses one try only."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

#: A try is not begun with fewer seconds left than this.
_LEAST_SECONDS = 4.0


class NotHere(Exception):
    """Something cannot be tried on this machine; the message says why. No failure."""


class DeviceLost(RuntimeError):
    """The device answers no more in this process: another process goes on without the try that broke it."""


class Record:
    """Tables of a part. A try that the file knows already is not made again.

    Args:
        part: Its name.
        folder: Where the file lies, ``<part>.json``.
        seconds: How long the part may take from now on.
    """

    def __init__(self, part: str, folder: Path, seconds: float) -> None:
        self.path = folder / f"{part}.json"
        self.deadline = time.monotonic() + seconds
        fresh: dict[str, Any] = {
            "part": part, "status": "running", "seconds": 0.0, "began": time.time(), "doing": None, "tables": {}, "tries": {},
            "errors": {}, "details": {}, "left_out": [],
        }  # fmt: skip
        self.data = json.loads(self.path.read_text()) if self.path.exists() else fresh
        self.data |= {"status": "running", "left_out": []}
        self.save()

    @property
    def time_left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def save(self) -> None:
        """Writes the file, whole or not at all."""
        self.data["seconds"] = round(time.time() - self.data["began"], 1)
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.data, default=str))
        os.replace(new, self.path)

    def row(self, table: str, **cells: Any) -> None:
        """Adds a row to a table."""
        self.data["tables"].setdefault(table, []).append({k: v for k, v in cells.items() if v is not None})

    def detail(self, name: str, value: Any) -> None:
        """Keeps something that is for the file alone."""
        self.data["details"][name] = value

    def is_new(self, key: str) -> bool:
        """Whether a try has not been made yet, in this process or one before it."""
        return key not in self.data["tries"]

    def begin_try(self, key: str, limit: float, *, even_late: bool = False) -> bool:
        """Says what is being tried, for whoever watches; False where no time is left for it (unless ``even_late``)."""
        if not even_late and self.time_left < _LEAST_SECONDS:
            self.data["left_out"].append(key)
            return False
        self.data["doing"] = {"key": key, "since": time.time(), "limit": limit}
        self.save()
        return True

    def end_try(self, key: str, outcome: str = "ok") -> None:
        """The try is over."""
        self.data["tries"][key], self.data["doing"] = outcome, None
        self.save()

    def fail_try(self, key: str, error: BaseException) -> None:
        """The try is over with an error.

        Raises:
            DeviceLost: If the device answers no more.
        """
        line = one_line(error)
        outcome = "not here" if isinstance(error, NotHere) else "failed"
        if outcome == "failed":
            self.data["errors"][key] = {"line": line, "trace": trace_of(error)}
            print(f"FAILED {key}: {line}", flush=True)
        error.__traceback__ = None  # it holds tensors
        self.end_try(key, outcome)
        free_memory()

    def attempt(
        self, table: str, name: str, function: Callable[[], Mapping[str, Any] | None], *, limit: float = 60, **labels: Any
    ) -> None:  # fmt: skip
        """Adds a row with what a function returns, or with its error. A cell ``ok`` that is False makes it wrong.

        Args:
            table: Title.
            name: Of the try; the first column.
            function: Returns cells.
            limit: Seconds after which whoever watches ends this process and has another go on with the next try.
            **labels: Cells in front of those returned.
        """
        key = " / ".join([table, *map(str, labels.values()), name])
        if not self.is_new(key) or not self.begin_try(key, limit):
            return
        try:
            cells = dict(function() or {})
            synchronize()
        except Exception as error:
            self.row(table, **labels, what=name, note=one_line(error))
            self.fail_try(key, error)
            return
        self.row(table, **labels, what=name, **cells)
        self.end_try(key, "ok" if cells.get("ok", True) else "WRONG")


@dataclass(frozen=True)
class Context:
    """What each part is given.

    Args:
        device: On which it runs.
        rehearse: Everything is tiny, and nothing is measured.
        record: What it finds.
        scratch: A folder for its files, emptied afterwards.
    """

    device: torch.device
    rehearse: bool
    record: Record
    scratch: Path

    def pick(self, real: Any, small: Any) -> Any:
        """One or the other, by whether this is a rehearsal."""
        return small if self.rehearse else real

    @property
    def on_gpu(self) -> bool:
        """Whether there is one."""
        return self.device.type == "cuda"

    def needs_gpu(self) -> None:
        """Raises :class:`NotHere` where there is none."""
        if not self.on_gpu:
            raise NotHere("needs a GPU")

    def needs_float8(self) -> None:
        """Raises :class:`NotHere` on a GPU without FP8; on CPU its numbers are computed in float32."""
        if self.on_gpu and _cuda().get_device_capability(self.device) < (9, 0):
            raise NotHere("FP8 needs a GPU of compute capability 9.0 or newer")


def _cuda() -> Any:
    """``torch.cuda`` if this process uses a GPU, else None."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def synchronize() -> None:
    """Waits for the device; errors of earlier kernels come up here."""
    if cuda := _cuda():
        cuda.synchronize()


def free_memory() -> None:
    """Gives back what nobody holds.

    Raises:
        DeviceLost: If the device answers no more.
    """
    if cuda := _cuda():
        gc.collect()
        try:
            cuda.synchronize()
            cuda.empty_cache()
        except Exception as error:
            raise DeviceLost(one_line(error)) from None


def one_line(error: BaseException) -> str:
    """The kind and the first line of what an error says, at most 200 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return (str(error) if isinstance(error, NotHere) else text)[:200]


def trace_of(error: BaseException) -> str:
    """The end of its traceback."""
    return "".join(traceback.format_exception(error))[-3000:]

# SPDX-License-Identifier: Apache-2.0
"""Writes safetensors files while their tensors arrive, in a thread of its own.

The header of a file says where each tensor lies, and so can be written before any of them is there. What waits to be written
is bounded, whatever the size of a file.
"""

from __future__ import annotations

import json
import os
import queue
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_moefold.checkpoint.sums import block_sums, bytes_of

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
#: Bytes of tensors that wait; a larger one waits alone.
_WAITING = 1 << 29


@dataclass(frozen=True)
class PlannedFile:
    """A file to write: its path, and dtype and shape of each tensor, in the order in which they come."""

    path: Path
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]]

    def header(self) -> bytes:
        """Returns the beginning of the file: the length of the header, and the header."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name, (dtype, shape) in self.tensors.items():
            end = position + torch.Size(shape).numel() * dtype.itemsize
            entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
            position = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


class WritingThread:
    """Writes tensors to files, one file after the other, in the order in which the tensors come.

    Attributes:
        sums: Checksums of the blocks of each tensor, by name; complete after :meth:`finish`.
    """

    def __init__(self, files: Sequence[PlannedFile]) -> None:
        self.sums: dict[str, list[str]] = {}
        self._files = files
        self._queue: queue.Queue[tuple[str, Tensor] | None] = queue.Queue()
        self._waiting, self._fewer = 0, threading.Condition()
        self._error: Exception | None = None
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="moefold writer", daemon=True)
        self._thread.start()

    def put(self, name: str, tensor: Tensor) -> None:
        """Hands over the next tensor, contiguous and on the CPU; waits while too many bytes have not been written."""
        with self._fewer:
            self._fewer.wait_for(lambda: not self._waiting or self._waiting + tensor.nbytes <= _WAITING)
            self._waiting += tensor.nbytes
        self._queue.put((name, tensor))

    def finish(self) -> None:
        """Waits until all files are on disk.

        Raises:
            OSError: If one could not be written.
        """
        self._queue.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            for planned in self._files:
                self._write(planned)
        except Exception as error:  # kept until all ranks can hear of it; peers still send their pieces meanwhile
            self._error = error
        while not self._ended:
            self._next()

    def _next(self) -> tuple[str, Tensor] | None:
        item = self._queue.get()
        if item is None:
            self._ended = True
        else:
            with self._fewer:
                self._waiting -= item[1].nbytes
                self._fewer.notify()
        return item

    def _write(self, planned: PlannedFile) -> None:
        with planned.path.open("wb") as file:
            file.write(planned.header())
            for name in planned.tensors:
                item = self._next()
                if item is None:
                    raise InterruptedError(f"{planned.path.name} has not got all of its tensors")
                assert item[0] == name
                tensor = item[1]
                if tensor.numel():
                    file.write(bytes_of(tensor))
                self.sums[name] = block_sums(tensor)
            file.flush()
            os.fsync(file.fileno())

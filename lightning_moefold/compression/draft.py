# SPDX-License-Identifier: Apache-2.0
"""What an interrupted analysis leaves behind, so that the same analysis goes on with the next layer.

Each rank keeps its hidden states. A save is complete or invisible: hidden states go to files named for the layer, and only
when those of all ranks are there does the state name that layer.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_moefold import comm
from lightning_moefold.mesh import Axis


def digest_of(*parts: Any) -> str:
    """Returns a hash of tensors and plain values."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part.numpy().tobytes() if isinstance(part, Tensor) else repr(part).encode())
        digest.update(b"|")
    return digest.hexdigest()


class Draft:
    """A directory with the state of an analysis.

    Args:
        folder: The directory, which all ranks see.
        key: Identifies the analysis; a state with another key is not used.
        world: All ranks.
        every: Seconds between two saves.
    """

    def __init__(self, folder: Path, key: str, world: Axis, every: float) -> None:
        self.folder, self.key, self.world, self.every = folder, key, world, every
        self._saved = time.monotonic()

    def resume(self, device: torch.device) -> tuple[int, list[np.ndarray], list[Tensor] | None]:
        """Returns the number of layers done, the arrays and this rank's hidden states; None without a state."""
        state = self.folder / "state.json"
        read: dict[str, Any] = json.loads(state.read_text()) if state.is_file() else {"key": None}
        if read["key"] != self.key:
            return 0, [], None
        done = read["done"]
        with np.load(self.folder / f"found-{done}.npz", allow_pickle=False) as file:
            found = [file[f"arr_{i}"] for i in range(len(file.files))]
        tensors = load_file(self._hidden(done), device=str(device))
        return done, found, [tensors[str(i)] for i in range(len(tensors))]

    def save(self, done: int, found: Sequence[np.ndarray], hidden: Sequence[Tensor]) -> None:
        """Saves, if the last save is long enough ago on the first rank. Collective."""
        if not comm.broadcast_object(time.monotonic() - self._saved >= self.every, self.world):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        save_file({str(i): x.contiguous() for i, x in enumerate(hidden)}, self._hidden(done))
        self._wait()
        if self.world.index == 0:
            np.savez(self.folder / f"found-{done}.npz", *found)
            draft = self.folder / "state.json.tmp"
            draft.write_text(json.dumps({"key": self.key, "done": done}))
            draft.replace(self.folder / "state.json")
            for file in self.folder.iterdir():
                if file.stem.startswith(("found-", "hidden-")) and file.stem.rpartition("-")[2] != str(done):
                    file.unlink()
        self._wait()
        self._saved = time.monotonic()

    def remove(self) -> None:
        """Removes the directory. Collective."""
        self._wait()
        if self.world.index == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _hidden(self, done: int) -> Path:
        return self.folder / f"hidden-{self.world.index}of{self.world.size}-{done}.safetensors"

    def _wait(self) -> None:
        if self.world.size > 1:
            dist.barrier(group=self.world.group)

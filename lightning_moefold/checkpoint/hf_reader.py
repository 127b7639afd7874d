# SPDX-License-Identifier: Apache-2.0
"""Reads slices of a Hugging Face checkpoint (safetensors, one file or several with an index).

All headers are checked before any tensor is read: each file against the index, and each tensor against the shape that
the model expects. Only safetensors files inside the directory are read. No tensor is ignored silently: a directory with
other weights that ``transformers`` would read is refused.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_moefold.checkpoint.sums import (
    CHECKSUMS,
    bytes_of,
    is_known,
    rows_of_block,
    sum_of,
    unpack_sums,
)
from lightning_moefold.errors import CheckpointError

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_ADAPTER = "adapter_config.json"
#: Pieces of all files together that tell the weights of one checkpoint from those of another, and bytes of each.
_SAMPLES, _PIECE = 1024, 64

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class StoredTensor:
    """The file that holds a tensor, with the tensor's dtype and shape."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class HFCheckpoint:
    """A checkpoint directory whose headers have been read and checked; tensors are read on demand.

    Args:
        path: Directory with ``model.safetensors``, or with shards and ``model.safetensors.index.json``.

    Raises:
        CheckpointError: If a file is missing, truncated, outside the directory, or contradicts the index.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path} is not a directory; give a directory in Hugging Face format.")
        if (self.path / _ADAPTER).is_file():
            raise CheckpointError(
                f"{self.path} holds {_ADAPTER}, an adapter that transformers adds to the weights; merge it into them (moefold "
                "merge), or take it out of the directory."
            )
        self._sums = self._read_sums()
        weight_map = self._weight_map()
        self.tensors: dict[str, StoredTensor] = {}
        self._handles: dict[Path, Any] = {}
        self._checked: set[tuple[str, int]] = set()
        for file in sorted(set(weight_map.values())):
            self._read_header(self.path / file, {name for name, where in weight_map.items() if where == file})

    def _read_sums(self) -> dict[str, list[str]]:
        """The checksums of the blocks of each tensor; empty if there are none, or of an unknown kind."""
        file = self.path / CHECKSUMS
        if not file.is_file():
            return {}
        content = unpack_sums(file.read_bytes(), file)
        self._algorithm, self._block = content["algorithm"], int(content["block"])
        if not is_known(self._algorithm):
            return {}
        for name, checksum in content["files"].items():
            if not (self.path / name).is_file() or sum_of((self.path / name).read_bytes(), self._algorithm) != checksum:
                what = f"{self.path / name} is not the one that was exported"
                if name == INDEX:
                    raise CheckpointError(f"{what}; if it is meant to be another, delete {CHECKSUMS}.")
                warnings.warn(f"{what}; delete {CHECKSUMS} if that is meant.", stacklevel=2)
        return dict(content["tensors"])

    def _weight_map(self) -> dict[str, str]:
        index = self.path / INDEX
        if not index.is_file():
            if not (self.path / _SINGLE).is_file():
                raise CheckpointError(f"{self.path} holds neither {_SINGLE} nor {INDEX}; only safetensors is read.")
            with _open(self.path / _SINGLE) as file:
                return dict.fromkeys(file.keys(), _SINGLE)
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
        except (ValueError, RecursionError, KeyError, TypeError) as error:
            raise CheckpointError(f"{index} is not a safetensors index ({type(error).__name__}: {error}).") from None
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise CheckpointError(f"{index} has a weight_map that does not map names to files.")
        root = self.path.resolve()
        for name, file in weight_map.items():
            # A shard may be a symbolic link (the hub's cache uses them), but its name must not point outside of the
            # directory.
            plain = Path(file)
            if plain.is_absolute() or ".." in plain.parts or plain.suffix != ".safetensors":
                raise CheckpointError(
                    f"{index} says that {name!r} lies in {file!r}, which is not a safetensors file inside {root}."
                )
            if plain.parts != (_SINGLE,) and (self.path / _SINGLE).is_file():
                raise CheckpointError(
                    f"{self.path} holds two sets of weights, {_SINGLE} and the files of {INDEX}; delete the one that is not "
                    f"meant (transformers reads {_SINGLE})."
                )
            if not (self.path / plain).is_file():
                raise CheckpointError(f"{self.path / plain} is missing, but {INDEX} names it for {name!r}.")
        return weight_map

    def _read_header(self, file: Path, expected: set[str]) -> None:
        with _open(file) as opened:
            names = set(opened.keys())
            for name in sorted(expected - names):
                raise CheckpointError(f"{file} does not hold {name!r}, which the index places there.")
            for name in sorted(names - expected):
                raise CheckpointError(
                    f"{file} holds {name!r}, which the index does not place there; write the index anew."
                )
            for name in expected:
                part = opened.get_slice(name)
                kind = part.get_dtype()
                if kind not in DTYPES:
                    raise CheckpointError(f"{name!r} in {file} has dtype {kind}; only {', '.join(DTYPES)} are read.")
                self.tensors[name] = StoredTensor(file, tuple(part.get_shape()), DTYPES[kind])

    def check(
        self, expected: Mapping[str, tuple[int, ...]], optional: Mapping[str, tuple[int, ...]] | None = None
    ) -> None:
        """Checks the names and shapes of all tensors against those that a model expects.

        Args:
            expected: Shapes of the tensors that must exist, by name.
            optional: Shapes of tensors that may exist as well; the caller compares their values.

        Raises:
            CheckpointError: If a tensor is missing, unexpected or of the wrong shape; the message names the first and
                counts the others.
        """
        known = {**(optional or {}), **expected}
        missing = [name for name in expected if name not in self.tensors]
        if missing:
            raise CheckpointError(
                f"{str(self.path)!r} has no tensor {missing[0]!r}{_more(missing)}, which the configuration asks for."
            )
        extra = sorted(name for name in self.tensors if name not in known)
        if extra:
            raise CheckpointError(
                f"{self.path} holds {extra[0]!r}{_more(extra)}, which a model of its configuration does not have."
            )
        for name, tensor in self.tensors.items():
            if tensor.shape != tuple(known[name]):
                raise CheckpointError(
                    f"{name!r} in {tensor.file} has shape {list(tensor.shape)}, but the configuration makes it "
                    f"{list(known[name])}."
                )

    def read(self, name: str, slices: tuple[slice, ...]) -> Tensor:
        """Reads part of a tensor, in its stored dtype.

        Raises:
            CheckpointError: If the file cannot be read.
        """
        file = self.tensors[name].file
        if file not in self._handles:  # opening a file parses its header, which may list thousands of experts
            self._handles[file] = _Opened(file).__enter__()
        try:
            whole = self._handles[file].get_tensor(name)  # a view of the mapped file
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{name!r} cannot be read from {file} ({error}).") from None
        if self._sums:
            self._check_sums(name, whole, slices[0] if slices else slice(None))
        return whole[slices] if slices else whole

    def _check_sums(self, name: str, whole: Tensor, rows: slice) -> None:
        """Compares the checksums of the blocks in which ``rows`` lie, each once."""
        sums = self._sums.get(name, [])
        count = rows_of_block(whole.shape, whole.itemsize, self._block)
        begin, end, _ = rows.indices(whole.shape[0] if whole.dim() else 1)
        rows_D = whole if whole.dim() else whole[None]
        for number in range(begin // count, -(-end // count)):
            if (name, number) in self._checked:
                continue
            block = rows_D[number * count : (number + 1) * count]
            if number >= len(sums) or sum_of(bytes_of(block), self._algorithm) != sums[number]:
                raise CheckpointError(
                    f"{self.tensors[name].file} is damaged: {name!r} does not have the checksum that was exported; if the weights "
                    f"are meant to be others, delete {CHECKSUMS}."
                )
            self._checked.add((name, number))

    def fingerprint(self) -> str:
        """A hash of configuration, index, tensor headers and samples of all files, so that little of the weights is read."""
        digest = hashlib.blake2b(digest_size=16)
        for name in ("config.json", INDEX):
            file = self.path / name
            digest.update(file.read_bytes() if file.is_file() else b"")
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name} {tensor.file.name} {tensor.shape} {tensor.dtype}\n".encode())
        files = sorted({tensor.file for tensor in self.tensors.values()})
        for file in files:
            digest.update(_sample(file, max(_SAMPLES // len(files), 16)))
        return digest.hexdigest()

    def close(self) -> None:
        """Closes the files that :meth:`read` opened."""
        for handle in self._handles.values():
            handle.__exit__(None, None, None)
        self._handles.clear()


def _sample(path: Path, count: int) -> bytes:
    """Reads ``count`` pieces of a file, evenly spread over its tensors."""
    with path.open("rb", buffering=0) as file:
        start = 8 + int.from_bytes(file.read(8), "little")  # of the tensors, behind the header
        step, pieces = (path.stat().st_size - start) / count, []
        for number in range(count):
            file.seek(start + int(step * number))
            pieces.append(file.read(_PIECE))
    return b"".join(pieces)


class _Opened:
    """Opens a file with ``safe_open`` and turns its errors into CheckpointErrors."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __enter__(self):  # type: ignore[no-untyped-def]  # safetensors has no type for an open file
        try:
            self._handle = safe_open(str(self._file), framework="pt")
            return self._handle.__enter__()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._file} is damaged or truncated ({error}).") from None

    def __exit__(self, *exc: object) -> None:
        self._handle.__exit__(*exc)


def _open(file: Path) -> _Opened:
    return _Opened(file)


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""

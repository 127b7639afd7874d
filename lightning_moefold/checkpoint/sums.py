# SPDX-License-Identifier: Apache-2.0
"""Checksums of what is stored, and the files that hold them beside it.

XXH3 where the package ``xxhash`` is installed (it comes with ``datasets``), otherwise CRC-32 of Python's zlib, a fifth as
fast. A file of checksums begins with its own.
"""

from __future__ import annotations

import functools
import json
import math
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from torch import Tensor

from lightning_moefold.errors import CheckpointError

try:
    import xxhash
except ImportError:
    xxhash = None  # type: ignore[assignment]

#: Bytes of an exported tensor that have a checksum of their own.
BLOCK = 1 << 20
#: File with the checksums of an exported model.
CHECKSUMS = "checksums.json"


class Sum(Protocol):
    """A checksum that grows with the bytes that are added."""

    def update(self, data: Any, /) -> None:
        """Adds bytes."""

    def hexdigest(self) -> str:
        """Returns the checksum of what has been added."""


class _CRC32:
    def __init__(self) -> None:
        self._value = 0

    def update(self, data: Any, /) -> None:
        self._value = zlib.crc32(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:08x}"


_KINDS: dict[str, Callable[[], Sum]] = {"crc32": _CRC32} | ({} if xxhash is None else {"xxh3_64": xxhash.xxh3_64})
#: The checksum that is written.
ALGORITHM = "crc32" if xxhash is None else "xxh3_64"


def new_sum(algorithm: str = ALGORITHM) -> Sum:
    """Returns an empty checksum; ``algorithm`` is one for which :func:`is_known` is true."""
    return _KINDS[algorithm]()


def sum_of(data: Any, algorithm: str = ALGORITHM) -> str:
    """Returns the checksum of bytes."""
    made = new_sum(algorithm)
    made.update(data)
    return made.hexdigest()


@functools.cache
def is_known(algorithm: str) -> bool:
    """Whether checksums of this kind can be computed here; if not, a warning says so once."""
    if algorithm not in _KINDS:
        warnings.warn(
            f"checksums of the kind {algorithm!r} cannot be computed here, and what is read is not checked; pip install xxhash.",
            stacklevel=2,
        )
    return algorithm in _KINDS


def pack_sums(content: dict[str, Any]) -> bytes:
    """Returns the bytes of a file of checksums: a line with the CRC-32 of the rest, then ``content`` as JSON."""
    text = json.dumps({"algorithm": ALGORITHM, **content}, separators=(",", ":"), sort_keys=True).encode()
    return f"{zlib.crc32(text):08x}\n".encode() + text


def unpack_sums(packed: bytes, where: object) -> dict[str, Any]:
    """Returns the content of a file of checksums.

    Raises:
        CheckpointError: If it is damaged.
    """
    own, _, text = packed.partition(b"\n")
    if own != f"{zlib.crc32(text):08x}".encode():
        raise CheckpointError(f"{where} is damaged: it does not have the checksum that it names.")
    try:
        content = json.loads(text)
        content["algorithm"].encode()
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{where} is damaged: it holds no checksums.") from None
    return dict(content)


def rows_of_block(shape: Sequence[int], itemsize: int, block: int) -> int:
    """Rows of a tensor whose checksum is kept together: about ``block`` bytes, so that a slice is checked by little more."""
    return max(1, block // max(1, itemsize * math.prod(shape[1:])))


def block_sums(tensor: Tensor) -> list[str]:
    """Returns the checksum of each block of rows of a contiguous tensor on the CPU."""
    rows = rows_of_block(tensor.shape, tensor.itemsize, BLOCK)
    return [sum_of(bytes_of(block)) for block in (tensor if tensor.dim() else tensor[None]).split(rows)]


def bytes_of(tensor: Tensor) -> Any:
    """Returns the bytes of a contiguous tensor on the CPU, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def check_archive(file: Path | IO[bytes]) -> None:
    """Compares the CRC-32 of each part of what ``torch.save`` has written, which ``torch.load`` does not look at.

    Raises:
        CheckpointError: If a part does not have its checksum, or it is no archive.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, OSError, EOFError, zlib.error) as error:
        raise CheckpointError(f"it is damaged ({error})") from None
    if damaged is not None:
        raise CheckpointError(f"it is damaged: {damaged} does not have its checksum")

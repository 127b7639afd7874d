# SPDX-License-Identifier: Apache-2.0
"""Writes the stored chunks of tensors, in the files of torch.distributed.checkpoint (:mod:`.chunk_reader` reads them).

A rank writes its boxes of all tensors one after another into one file, each as ``torch.save`` writes it; of a stack of
experts, each expert is a chunk of its own, so that a rank that needs one of them reads one. The list of all chunks is torch's
``.metadata``, and torch's own reader can read the directory. Beside it, ``.checksums`` has a checksum of each chunk and of
the list. A rank checks the chunks that it reads.
"""

from __future__ import annotations

import gc
import pickle
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from lightning_moefold.checkpoint import stores
from lightning_moefold.checkpoint.sums import new_sum, pack_sums, sum_of
from lightning_moefold.errors import CheckpointError
from lightning_moefold.layout import Box, split_boxes

LIST, SUMS = ".metadata", ".checksums"


@dataclass(frozen=True)
class TensorPiece:
    """A rank's boxes of a global tensor.

    Args:
        piece: This rank's elements; written to when loading.
        boxes: Their places in the global tensor (:meth:`~.layout.ParameterLayout.boxes`).
        shape: Shape of the whole.
        writes: Whether this rank writes the piece (one of several ranks with the same boxes does).
        stacked: Whether each index of the first dimension is a chunk of its own.
    """

    piece: Tensor
    boxes: tuple[Box, ...]
    shape: tuple[int, ...]
    writes: bool = True
    stacked: bool = False

    @classmethod
    def of(cls, tensor: Tensor | TensorPiece) -> TensorPiece:
        """Describes a tensor that this rank has whole."""
        if isinstance(tensor, TensorPiece):
            return tensor
        return cls(tensor.detach(), (Box.whole(tensor.shape),), tuple(tensor.shape))

    def parts(self) -> list[tuple[Box, Tensor]]:
        """Each box with a view of its elements."""
        return list(zip(self.boxes, split_boxes(self.piece.detach(), self.boxes), strict=True))

    def chunks(self) -> list[tuple[Box, Tensor]]:
        """The parts as they are stored; none that is empty."""
        found = self.parts()
        if self.stacked:
            found = [
                (Box((box.offsets[0] + i, *box.offsets[1:]), (1, *box.sizes[1:])), part[i : i + 1])
                for box, part in found
                for i in range(box.sizes[0])
            ]
        return [(box, part) for box, part in found if box.numel]


@dataclass
class Written:
    """What a rank has written: of each tensor dtype and shape, and where its chunks are.

    A chunk is ``(name, offsets, sizes, start, length, checksum, data)``; ``data`` is where the elements begin in the chunk, or
    -1 if that is not known.
    """

    file: str
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = field(default_factory=dict)
    chunks: list[tuple[str, tuple[int, ...], tuple[int, ...], int, int, str, int]] = field(default_factory=list)


def write_chunks(place: Path | str, rank: int, tensors: Mapping[str, Tensor | TensorPiece], summed: bool) -> Written:
    """Writes a rank's chunks into its file of a directory; nothing is created if it has none. A plain tensor is whole.

    Raises:
        OSError: If the file cannot be written.
    """
    written = Written(f"__{rank}_0.distcp")
    pieces = {name: described for name, tensor in tensors.items() if (described := TensorPiece.of(tensor)).writes}
    if not any(box.numel for piece in pieces.values() for box in piece.boxes):
        written.tensors = {name: (piece.piece.dtype, piece.shape) for name, piece in pieces.items()}
        return written
    with stores.create(stores.join(place, written.file)) as file:
        position = 0
        for name, piece in pieces.items():
            written.tensors[name] = piece.piece.dtype, piece.shape
            for box, part in piece.chunks():
                stream = _Chunk(file, _by_itself(part), summed)
                stream.save()
                where = position, stream.length, stream.checksum, stream.data
                written.chunks.append((name, box.offsets, box.sizes, *where))
                position += stream.length
    return written


def _by_itself(part: Tensor) -> Tensor:
    """The part on the CPU with a storage of its own size: ``torch.save`` writes whole storages."""
    part = part.cpu().contiguous()
    size = part.numel() * part.itemsize
    if part.untyped_storage().nbytes() == size:
        return part
    begin = part.storage_offset() * part.itemsize
    storage = part.untyped_storage()[begin : begin + size]  # shares the memory
    return torch.empty(0, dtype=part.dtype).set_(storage, 0, part.shape)  # type: ignore[call-overload]


class _Chunk:
    """What ``torch.save`` writes one tensor to: counts and sums the bytes, and notes where the elements begin."""

    def __init__(self, file: IO[bytes], tensor: Tensor, summed: bool) -> None:
        self._file, self._tensor = file, tensor
        self._sum = new_sum() if summed else None
        self._error: OSError | None = None
        self.length, self.data = 0, -1

    def save(self) -> None:
        """Writes the tensor, as ``torch.save`` does.

        Raises:
            OSError: If the file cannot be written.
        """
        try:
            torch.save(self._tensor, self)  # type: ignore[arg-type]
        except RuntimeError as error:  # torch's, over that of the system
            raise self._error or error from None

    def write(self, data: Any) -> int:
        """Passes on what torch writes, and notes where the tensor's own bytes begin."""
        view = memoryview(data)
        if 0 < view.nbytes == self._tensor.nbytes and _address(view) == self._tensor.data_ptr():
            self.data = self.length
        try:
            self._file.write(view)
        except OSError as error:
            self._error = error
            raise
        if self._sum is not None:
            self._sum.update(view)
        self.length += view.nbytes
        return view.nbytes

    def flush(self) -> None:
        """Nothing is kept back here."""

    @property
    def checksum(self) -> str:
        return "" if self._sum is None else self._sum.hexdigest()


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).ctypes.data)


@contextmanager
def no_collection() -> Iterator[None]:
    """Python's collector looks at hundreds of thousands of new objects again and again, and finds none to collect."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@no_collection()
def write_list(place: Path | str, parts: Sequence[Written], summed: bool) -> dict[str, int]:
    """Writes the list of what all ranks have written, and the checksums.

    Returns:
        The size that each file must have at least.

    Raises:
        CheckpointError: If the chunks of a tensor are not the whole of it.
        OSError: If a file cannot be written.
    """
    tensors: dict[str, TensorStorageMetadata] = {}
    where: dict[MetadataIndex, _StorageInfo] = {}
    sums: dict[str, list[tuple[int, int, str, int]]] = {}
    ends: dict[str, int] = {}
    for written in parts:
        for name, (dtype, shape) in written.tensors.items():
            tensors.setdefault(name, TensorStorageMetadata(TensorProperties(dtype), torch.Size(shape), []))
        for name, offsets, sizes, start, length, checksum, data in written.chunks:
            ends[written.file] = start + length
            begin, info = torch.Size(offsets), _StorageInfo(written.file, start, length)
            if where.setdefault(MetadataIndex(name, begin), info) is not info:  # several ranks had it whole
                continue
            tensors[name].chunks.append(ChunkStorageMetadata(begin, torch.Size(sizes)))
            sums.setdefault(written.file, []).append((start, length, checksum, data))
    for name, item in tensors.items():
        if sum(chunk.sizes.numel() for chunk in item.chunks) != item.size.numel():
            raise CheckpointError(f"the ranks do not hold {name!r} of shape {list(item.size)} once; report this.")
    names: Any = {name: (name,) for name in tensors}
    listed = pickle.dumps(Metadata(dict(tensors), names, where, StorageMeta()))
    with stores.create(stores.join(place, LIST)) as file:
        file.write(listed)
    if summed:
        packed = pack_sums({"list": sum_of(listed), "chunks": sums, "byteorder": sys.byteorder})
        with stores.create(stores.join(place, SUMS)) as file:
            file.write(packed)
    return ends

# SPDX-License-Identifier: Apache-2.0
"""Writes and reads the stored chunks of tensors, in the files of torch.distributed.checkpoint.

A rank writes its boxes of all tensors one after another into one file, each as ``torch.save`` writes it; of a stack of
experts, each expert is a chunk of its own, so that a rank that needs one of them reads one. The list of all chunks is torch's
``.metadata``, and torch's own reader can read the directory. Beside it, ``.checksums`` has a checksum of each chunk and of
the list. A rank checks the chunks that it reads.
"""

from __future__ import annotations

import gc
import io
import pickle
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from lightning_moefold.checkpoint.reasons import reason_of
from lightning_moefold.checkpoint.safe_metadata import unpickle_list
from lightning_moefold.checkpoint.sums import is_known, new_sum, pack_sums, sum_of, unpack_sums
from lightning_moefold.errors import CheckpointError
from lightning_moefold.layout import Box, split_boxes

LIST, SUMS = ".metadata", ".checksums"
#: Bytes that are read and added to a checksum at a time, so that they are in the processor's cache for the second.
_BLOCK = 1 << 18


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
    """Writes a rank's chunks into a file of a directory; nothing is created if it has none.

    Args:
        place: The directory, local or in a store.
        rank: This rank, which names the file.
        tensors: What it has; a plain tensor is whole.
        summed: Whether checksums are computed.

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
        try:
            torch.save(self._tensor, self)  # type: ignore[arg-type]
        except RuntimeError as error:  # torch's, over that of the system
            raise self._error or error from None

    def write(self, data: Any) -> int:
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
def _no_collection() -> Iterator[None]:
    """Python's collector looks at hundreds of thousands of new objects again and again, and finds none to collect."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_no_collection()
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


@dataclass
class _Wanted:
    """A stored chunk that is to be read, and the views that parts of it are copied to."""

    name: str
    start: int
    length: int
    sizes: tuple[int, ...]
    dtype: torch.dtype
    targets: list[tuple[Tensor, tuple[slice, ...]]] = field(default_factory=list)


class StoredChunks:
    """The chunks of a directory, read and checked one at a time.

    Args:
        place: The directory, local or in a store.
        check: Whether checksums are compared, where there are any.
        summed: Whether there must be some.

    Attributes:
        items: Shape and dtype of each tensor by name.

    Raises:
        CheckpointError: If the list of chunks, or that of checksums, cannot be read.
    """

    def __init__(self, place: Path | str, *, check: bool = True, summed: bool = False) -> None:
        self._place = place
        try:
            listed = stores.read(stores.join(place, LIST))
        except Exception as error:  # of any store
            raise CheckpointError(
                f"{place} is damaged: its list of tensors cannot be read: {reason_of(error)}."
            ) from None
        self._check = check
        self._sums = self._read_sums(listed, summed)
        try:
            with _no_collection():
                self._list = unpickle_list(listed)
        except Exception as error:  # pickle raises errors of any class
            raise CheckpointError(
                f"{place} is damaged: its list of tensors cannot be read ({reason_of(error)})."
            ) from None
        self.items: dict[str, TensorStorageMetadata] = dict(self._list.state_dict_metadata)  # type: ignore[arg-type]
        self._buffer = bytearray()

    def _read_sums(self, listed: bytes, summed: bool) -> dict[tuple[str, int, int], tuple[str, int]]:
        """Checksum and beginning of the elements of each chunk; empty if there are none, or of an unknown kind."""
        file = stores.join(self._place, SUMS)
        if not stores.is_file(file):
            if summed and self._check:
                raise CheckpointError(f"{self._place} is damaged: its file {SUMS} is gone.")
            return {}
        try:
            content = unpack_sums(stores.read(file), file)
        except CheckpointError:
            if self._check:
                raise
            return {}
        self._algorithm = content["algorithm"]
        if self._check and not is_known(self._algorithm):
            return {}
        if self._check and content["list"] != sum_of(listed, self._algorithm):
            raise CheckpointError(f"{self._place} is damaged: its list of tensors does not have its checksum.")
        native = content["byteorder"] == sys.byteorder
        return {
            (name, start, length): (checksum, data if native else -1)
            for name, chunks in content["chunks"].items()
            for start, length, checksum, data in chunks
        }

    def read(self, name: str) -> Tensor:
        """Reads a whole tensor.

        Raises:
            CheckpointError: If its file is damaged.
        """
        item = self.items[name]
        tensor = torch.empty(tuple(item.size), dtype=item.properties.dtype)
        self.fill({name: tensor})
        return tensor

    def fill(self, tensors: Mapping[str, Tensor | TensorPiece]) -> None:
        """Fills tensors and pieces of tensors in place.

        Raises:
            CheckpointError: If a tensor is missing or has another shape, or a file is damaged.
        """
        for file, wanted in self._plan(tensors).items():
            try:
                with stores.open_file(stores.join(self._place, file)) as opened:
                    for chunk in sorted(wanted, key=lambda chunk: chunk.start):
                        self._read_chunk(file, opened, chunk)
            except CheckpointError:
                raise
            except Exception as error:  # of any store
                raise CheckpointError(f"cannot read {file} of {self._place}: {reason_of(error)}.") from None

    def _plan(self, tensors: Mapping[str, Tensor | TensorPiece]) -> dict[str, Iterable[_Wanted]]:
        """The chunks of each file that are needed, each once."""
        files: dict[str, dict[int, _Wanted]] = defaultdict(dict)
        where = self._list.storage_data or {}
        for name, tensor in tensors.items():
            piece, item = TensorPiece.of(tensor), self.items.get(name)
            if item is None or tuple(item.size) != piece.shape:
                has = "has no" if item is None else f"has another shape than {list(piece.shape)} for"
                raise CheckpointError(f"{self._place} {has} {name!r}.")
            for box, part in piece.parts():
                missing = box.numel
                for chunk in item.chunks:
                    cut = _common(box, chunk)
                    if cut is None:
                        continue
                    info = where.get(MetadataIndex(name, chunk.offsets))
                    if info is None:
                        raise CheckpointError(f"{self._place} is damaged: it does not say where {name!r} lies.")
                    into, out_of = cut
                    held = files[info.relative_path].setdefault(
                        info.offset,
                        _Wanted(name, info.offset, info.length, tuple(chunk.sizes), item.properties.dtype),
                    )
                    target = part[into]
                    held.targets.append((target, out_of))
                    missing -= target.numel()
                if missing:
                    raise CheckpointError(f"{self._place} is damaged: it does not hold the whole of {name!r}.")
        return {file: chunks.values() for file, chunks in files.items()}

    def _read_chunk(self, file: str, opened: IO[bytes], chunk: _Wanted) -> None:
        stored = self._sums.get((file, chunk.start, chunk.length))
        if stored is None and self._sums and self._check:
            raise CheckpointError(f"{self._place} is damaged: {chunk.name!r} has no checksum.")
        if len(self._buffer) < chunk.length:
            self._buffer = bytearray(chunk.length)
        view = memoryview(self._buffer)[: chunk.length]
        checksum = new_sum(self._algorithm) if stored is not None and self._check else None
        opened.seek(chunk.start)
        done = 0
        while done < chunk.length:
            count = opened.readinto(view[done : done + _BLOCK])  # type: ignore[attr-defined]
            if not count:
                raise CheckpointError(
                    f"{file} of {self._place} is cut off; {chunk.name!r} was in the part that is missing."
                )
            if checksum is not None:
                checksum.update(view[done : done + count])
            done += count
        if checksum is not None and stored is not None and checksum.hexdigest() != stored[0]:
            raise CheckpointError(
                f"{file} of {self._place} is damaged: {chunk.name!r} does not have the checksum that was saved; go on from "
                "another checkpoint."
            )
        tensor = self._decode(file, chunk, view, -1 if stored is None else stored[1])
        for target, out_of in chunk.targets:
            target.copy_(tensor[out_of])

    def _decode(self, file: str, chunk: _Wanted, view: memoryview, data: int) -> Tensor:
        """The tensor of a chunk: a view of the bytes if it is known where its elements are, else as ``torch.load`` reads it."""
        count = torch.Size(chunk.sizes).numel()
        size = count * chunk.dtype.itemsize
        if 0 <= data <= chunk.length - size:
            return (
                torch.frombuffer(view, dtype=torch.uint8, count=size, offset=data).view(chunk.dtype).view(chunk.sizes)
            )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tensor = torch.load(io.BytesIO(view), map_location="cpu", weights_only=True)
        except Exception as error:  # torch and pickle raise errors of any class
            raise CheckpointError(
                f"{file} of {self._place} is damaged: {chunk.name!r} cannot be read ({reason_of(error)})."
            ) from None
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != chunk.sizes:
            raise CheckpointError(f"{file} of {self._place} is damaged: {chunk.name!r} is not what is listed.")
        return tensor


def _common(box: Box, chunk: ChunkStorageMetadata) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """The elements that a box and a stored chunk have in common, as index expressions of each; None if there are none."""
    into, out_of = [], []
    for mine, size, theirs, length in zip(box.offsets, box.sizes, chunk.offsets, chunk.sizes, strict=True):
        begin, end = max(mine, theirs), min(mine + size, theirs + length)
        if begin >= end:
            return None
        into.append(slice(begin - mine, end - mine))
        out_of.append(slice(begin - theirs, end - theirs))
    return tuple(into), tuple(out_of)

# SPDX-License-Identifier: Apache-2.0
"""Reads stored chunks of tensors, those that a rank needs and no others, and compares their checksums."""

from __future__ import annotations

import io
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from lightning_moefold.checkpoint import stores
from lightning_moefold.checkpoint.chunks import LIST, SUMS, TensorPiece, no_collection
from lightning_moefold.checkpoint.reasons import reason_of
from lightning_moefold.checkpoint.safe_metadata import unpickle_list
from lightning_moefold.checkpoint.sums import is_known, new_sum, sum_of, unpack_sums
from lightning_moefold.errors import CheckpointError
from lightning_moefold.layout import Box

#: Key in ``meta.pt`` of the folder with the tensors, if they are not beside it; and the prefix of such folders.
FOLDER, FOLDERS = "moefold_tensors", "tensors-"
#: Key in ``meta.pt`` that says whether the checkpoint has checksums.
SUMMED = "moefold_checksums"
#: Bytes that are read and added to a checksum at a time, so that they are in the processor's cache for the second.
_BLOCK = 1 << 18


@dataclass
class _Wanted:
    """A stored chunk that is to be read, and the views that parts of it are copied to."""

    name: str
    start: int
    length: int
    sizes: tuple[int, ...]
    dtype: torch.dtype
    targets: list[tuple[Tensor, tuple[slice, ...]]] = field(default_factory=list)


class StoredTensors:
    """The tensors of a checkpoint, whose chunks are read and checked one at a time.

    Args:
        path: The checkpoint, local or in a store.
        meta: Result of :func:`~.sharded.load_meta`.
        check: Whether checksums are compared, where there are any.

    Attributes:
        items: Shape and dtype of each tensor by name.

    Raises:
        CheckpointError: If the list of chunks, or that of checksums, cannot be read.
    """

    def __init__(self, path: str | Path, meta: Mapping[str, Any], *, check: bool = True) -> None:
        place, folder = stores.parse_path(path), meta.get(FOLDER, "")
        if folder and (not isinstance(folder, str) or not folder.startswith(FOLDERS) or "/" in folder):
            raise CheckpointError(f"{path} is damaged: its tensors are said to be in {folder!r}.")
        self._place = place = stores.join(place, folder) if folder else place
        try:
            listed = stores.read(stores.join(place, LIST))
        except Exception as error:  # of any store
            raise CheckpointError(
                f"{place} is damaged: its list of tensors cannot be read: {reason_of(error)}."
            ) from None
        self._check = check
        self._sums = self._read_sums(listed, bool(meta.get(SUMMED, False)))
        try:
            with no_collection():
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

# SPDX-License-Identifier: Apache-2.0
"""Layout-free training checkpoints, by torch.distributed.checkpoint.

A checkpoint is a directory. Tensors are stored under global names with global shapes; each rank writes the boxes it
owns and reads the boxes it needs, whatever fold wrote them. Everything that is not a tensor of the model or the
optimizer is in ``meta.pt``, read with ``weights_only=True``; reading runs no code from a checkpoint. A save appears
under its name only when it is complete. A local folder is renamed at the end. A store cannot rename, so each save
writes its tensors into a new folder below the checkpoint, and finally ``meta.pt``, in one request, which names that
folder.
"""

from __future__ import annotations

import io
import shutil
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path, PosixPath, PurePosixPath
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from lightning_moefold.agreement import agreeing
from lightning_moefold.checkpoint import stores
from lightning_moefold.checkpoint.hf_writer import replace_directory
from lightning_moefold.checkpoint.safe_metadata import SafeReader
from lightning_moefold.errors import CheckpointError
from lightning_moefold.layout import Box, split_boxes
from lightning_moefold.mesh import Axis

META = "meta.pt"
#: Key of the models' descriptions: by name, a mapping of ``config`` (Hugging Face's), ``dtypes`` (on disk) and ``path``
#: (of the source, or None).
MODELS = "moefold_models"
#: Key in ``meta.pt`` of the folder with the tensors, if they are not beside it; and the prefix of such folders.
FOLDER, _FOLDERS = "moefold_tensors", "tensors-"
#: Classes that hyperparameters may hold besides plain data.
_HARMLESS = (PosixPath, PurePosixPath)


class TensorPiece(Tensor):
    """A rank's boxes of a global tensor, in the terms of torch.distributed.checkpoint's protocol for such things."""

    piece: Tensor
    boxes: tuple[Box, ...]
    global_shape: tuple[int, ...]
    writes: bool

    @classmethod
    def of(
        cls, piece: Tensor, boxes: tuple[Box, ...], global_shape: tuple[int, ...], *, writes: bool = True
    ) -> TensorPiece:
        """Describes ``piece``.

        Args:
            piece: This rank's elements; written to when loading.
            boxes: Their places in the global tensor (:meth:`~.layout.ParameterLayout.boxes`).
            global_shape: Shape of the whole.
            writes: Whether this rank writes the piece (one of several ranks with the same boxes does).
        """
        described = piece.detach().as_subclass(cls)
        described.piece, described.boxes = piece.detach(), boxes
        described.global_shape, described.writes = global_shape, writes
        return described

    def size(self, dim: int | None = None) -> Any:
        """Returns the size of the global tensor, which checkpoints compare."""
        return torch.Size(self.global_shape) if dim is None else self.global_shape[dim]

    def _chunks(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(b.offsets), torch.Size(b.sizes)) for b in self.boxes if b.numel]

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.piece.dtype)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=torch.Size(self.global_shape)),
            )
            for chunk in self._chunks()
            if self.writes
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return self._chunks()

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        if len(self.boxes) == 1:
            return self.piece
        parts = zip(self.boxes, split_boxes(self.piece, self.boxes), strict=True)
        return next(part for box, part in parts if torch.Size(box.offsets) == index.offset)


def save_sharded(path: str | Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], world: Axis) -> None:
    """Writes a checkpoint. Collective.

    Args:
        path: Directory to create, local or in a store. An existing file or directory is replaced once the new one is
            complete.
        tensors: :class:`TensorPiece` for tensors that are spread over ranks, plain tensors for those that every rank
            has.
        meta: Everything else; rank 0's is written.
        world: All ranks.

    Raises:
        CheckpointError: If writing fails on any rank; raised on all ranks. An earlier checkpoint is then unchanged.
    """
    target = stores.parse_path(path)
    names = [uuid.uuid4().hex[:8]]
    if world.size > 1:
        dist.broadcast_object_list(names, src=world.ranks[0])
    if isinstance(target, str):
        _save_in_store(target, tensors, {**meta, FOLDER: _FOLDERS + names[0]}, world)
        return
    work = target.with_name(f".{target.name}.{names[0]}.tmp")
    try:
        with agreeing(world):
            if world.index == 0:
                work.mkdir(parents=True)
                stores.write(work / META, pack_meta(meta))
        _write_tensors(work, target, tensors, world)
        with agreeing(world):
            if world.index == 0:
                replace_directory(work, target)
    finally:
        if world.index == 0 and work.exists():
            shutil.rmtree(work, ignore_errors=True)


def _save_in_store(target: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], world: Axis) -> None:
    work, packed = stores.join(target, meta[FOLDER]), b""
    complete = False
    try:
        with agreeing(world):
            if world.index == 0:
                if stores.is_file(target):
                    raise CheckpointError(f"{target} is a file; give another name.")
                packed = pack_meta(meta)
        _write_tensors(work, target, tensors, world)
        with agreeing(world):
            if world.index == 0:
                stores.write(stores.join(target, META), packed)  # from here on, it is this save that is loaded
        complete = True
    finally:
        if world.index == 0:
            _clear(target, meta[FOLDER], complete)


def _clear(target: str, folder: str, complete: bool) -> None:
    """Removes the tensors of earlier saves, or those of this save if it failed."""
    try:
        old = [name for name in stores.folders(target) if name.startswith(_FOLDERS) and name != folder]
        for name in old if complete else [folder]:
            stores.remove(stores.join(target, name))
    except Exception as failure:  # the checkpoint itself is complete
        warnings.warn(f"unneeded folders of {target} could not be removed: {failure}", stacklevel=2)


def _write_tensors(work: Path | str, target: Path | str, tensors: Mapping[str, Tensor], world: Axis) -> None:
    """Writes the tensors, and checks that rank 0 sees the files of all ranks."""
    written: list[Any] = []
    writer = stores.connected(dcp.FileSystemWriter(work), work)
    _collective("write", target, lambda: written.append(dcp.save(dict(tensors), storage_writer=writer)))
    with agreeing(world):
        if world.index == 0:
            _check_files(work, target, written[0])


def _check_files(work: Path | str, target: Path | str, metadata: Any) -> None:
    ends = {".metadata": 1}
    for part in metadata.storage_data.values():
        ends[part.relative_path] = max(ends.get(part.relative_path, 0), part.offset + part.length)
    found = stores.sizes(work)
    for name, end in sorted(ends.items()):
        if found.get(name, -1) < end:
            raise CheckpointError(
                f"{target} is not complete: rank 0 does not see all of the file {name} that has been written; save to a "
                "place that all ranks share."
            )


def pack_meta(meta: Mapping[str, Any]) -> bytes:
    """Returns the content of ``meta.pt``: everything except the tensors.

    Raises:
        CheckpointError: If it could not be read back. This is reported now, rather than when the checkpoint is needed.
    """
    packed, foreign = _pack(dict(meta))
    if foreign is not None:
        raise CheckpointError(
            f"the checkpoint would hold a {foreign}, and only plain data is ever read back; keep numbers, strings and "
            "containers of them in hyperparameters and in the state of callbacks and schedulers."
        )
    return packed


def _pack(value: Any) -> tuple[bytes, str | None]:
    """Serialises a value; also returns the name of a class in it that could not be read back, or None."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    known = {f"{kind.__module__}.{kind.__qualname__}" for kind in _HARMLESS}
    foreign = sorted(set(torch.serialization.get_unsafe_globals_in_checkpoint(file)) - known)
    return file.getvalue(), foreign[0] if foreign else None


def check_readable(value: Any, what: str) -> None:
    """Checks that a value that checkpoints will hold can be written and read back.

    Args:
        value: The value to check.
        what: Description of the value, used as the subject of the error's sentence.

    Raises:
        CheckpointError: If it cannot.
    """
    try:
        foreign = _pack(value)[1]
    except Exception as failure:  # pickle raises errors of many classes
        raise CheckpointError(f"{what} cannot be saved in a checkpoint ({failure}); leave it out.") from None
    if foreign is not None:
        raise CheckpointError(
            f"{what} holds a {foreign}, and checkpoints give back plain data only; keep numbers, strings and containers of them "
            "(.value of an enum, .item() of a NumPy number, asdict of a dataclass, OmegaConf.to_container), or do without "
            "checkpoints."
        )


def load_meta(path: str | Path) -> dict[str, Any]:
    """Reads everything except the tensors.

    Raises:
        CheckpointError: If the directory is not a complete checkpoint.
    """
    file = stores.join(stores.parse_path(path), META)
    if not stores.is_file(file):
        raise CheckpointError(f"{path} is not a checkpoint of this strategy (it has no {META}).")
    try:
        with torch.serialization.safe_globals(list(_HARMLESS)):
            content = io.BytesIO(stores.read(file))
            return torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None


def tensors_of(path: str | Path, meta: Mapping[str, Any]) -> Path | str:
    """Returns the folder with the tensors of a checkpoint; ``meta`` is the result of :func:`load_meta`."""
    parsed, folder = stores.parse_path(path), str(meta.get(FOLDER, ""))
    if folder and (not folder.startswith(_FOLDERS) or "/" in folder):
        raise CheckpointError(f"{path} is damaged: its tensors are said to be in {folder!r}.")
    return stores.join(parsed, folder) if folder else parsed


def stored_tensors(path: str | Path) -> dict[str, TensorStorageMetadata]:
    """Returns shape and dtype of each tensor by name, for a folder returned by :func:`tensors_of`.

    Raises:
        CheckpointError: If the list cannot be read.
    """
    return _listed(_reader(stores.parse_path(path)))


def _reader(place: Path | str) -> SafeReader:
    return stores.connected(SafeReader(place), place)


def _listed(reader: SafeReader) -> dict[str, TensorStorageMetadata]:
    try:
        return reader.tensors()
    except Exception as error:
        raise CheckpointError(f"{reader.path} is damaged: its list of tensors cannot be read ({error}).") from None


class StoredTensors:
    """The tensors of a checkpoint, read one at a time by a single process.

    Args:
        path: Folder returned by :func:`tensors_of`.

    Attributes:
        items: Shape and dtype of each tensor by name.

    Raises:
        CheckpointError: If the list of tensors cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = stores.parse_path(path)
        self._reader = _reader(self._path)
        self.items = _listed(self._reader)

    def read(self, name: str) -> Tensor:
        """Reads a whole tensor.

        Raises:
            CheckpointError: If its file is damaged.
        """
        item = self.items[name]
        tensor = torch.empty(tuple(item.size), dtype=item.properties.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            _collective("read", self._path, lambda: dcp.load({name: tensor}, storage_reader=self._reader, no_dist=True))
        return tensor


def load_sharded(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Fills ``tensors`` in place from a folder returned by :func:`tensors_of`. Collective.

    Raises:
        CheckpointError: If a tensor is missing or has another shape, or a file is damaged; raised on all ranks.
    """
    reader = _reader(stores.parse_path(path))
    _collective("read", path, lambda: dcp.load(dict(tensors), storage_reader=reader))


def _collective(verb: str, path: str | Path, action: Any) -> None:
    try:
        action()
    except dcp.CheckpointException as error:  # a BaseException in torch: no ordinary handler would see it
        rank, (cause, _) = next(iter(error.failures.items()))
        raise CheckpointError(
            f"cannot {verb} {path}: rank {rank} failed with {type(cause).__name__}: {cause}"
        ) from None
    except Exception as error:
        raise CheckpointError(f"cannot {verb} {path}: {type(error).__name__}: {error}") from error

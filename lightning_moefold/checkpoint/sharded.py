# SPDX-License-Identifier: Apache-2.0
"""Layout-free training checkpoints, by torch.distributed.checkpoint.

A checkpoint is a directory. Tensors are stored under global names with global shapes; each rank writes the boxes it
owns and reads the boxes it needs, whatever fold wrote them. Everything that is not a tensor of the model or the
optimizer is in ``meta.pt``, read with ``weights_only=True``; reading runs no code of a checkpoint. A save appears under its
name only when it is complete.
"""

from __future__ import annotations

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

from lightning_moefold import comm
from lightning_moefold.checkpoint.hf_reader import CheckpointError
from lightning_moefold.checkpoint.hf_writer import replace_directory
from lightning_moefold.checkpoint.safe_metadata import SafeReader
from lightning_moefold.layout import Box
from lightning_moefold.mesh import Axis

META = "meta.pt"
#: What hyper-parameters may hold besides plain data.
_HARMLESS = (PosixPath, PurePosixPath)


class TensorPiece(Tensor):
    """A rank's box of a global tensor, in the terms of torch.distributed.checkpoint's protocol for such things."""

    piece: Tensor
    box: Box
    global_shape: tuple[int, ...]
    writes: bool

    @classmethod
    def of(cls, piece: Tensor, box: Box, global_shape: tuple[int, ...], *, writes: bool = True) -> TensorPiece:
        """Describes ``piece``.

        Args:
            piece: This rank's elements; written to when loading.
            box: Where they belong.
            global_shape: Shape of the whole.
            writes: Whether this rank writes the piece (one of several ranks with the same box does).
        """
        described = piece.detach().as_subclass(cls)
        described.piece, described.box = piece.detach(), box
        described.global_shape, described.writes = global_shape, writes
        return described

    def size(self, dim: int | None = None) -> Any:
        """Of the whole tensor, which is what checkpoints compare."""
        return torch.Size(self.global_shape) if dim is None else self.global_shape[dim]

    def _chunks(self) -> list[ChunkStorageMetadata]:
        return (
            [ChunkStorageMetadata(torch.Size(self.box.offsets), torch.Size(self.box.sizes))] if self.box.numel else []
        )

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

    def __get_tensor_shard__(self, _: MetadataIndex) -> Tensor:
        return self.piece


def save_sharded(path: str | Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], world: Axis) -> None:
    """Writes a checkpoint. Collective.

    Args:
        path: Directory to make; what is there already (file or directory) is replaced once the new one is complete.
        tensors: :class:`TensorPiece` for what is spread over ranks, plain tensors for what every rank has.
        meta: Everything else; rank 0's is written.
        world: All ranks.

    Raises:
        CheckpointError: If writing fails on any rank; raised on all, and what was there before is still there.
    """
    target = Path(path)
    names = [target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")]
    if world.size > 1:
        dist.broadcast_object_list(names, src=world.ranks[0])
    work = names[0]
    error: Exception | None = None
    try:
        try:
            if world.index == 0:
                work.mkdir(parents=True)
                _save_meta(dict(meta), work / META)
        except Exception as failure:
            error = failure
        comm.agree_on_error(error, world)
        _collective("write", target, lambda: dcp.save(dict(tensors), checkpoint_id=work))
        if world.index == 0:
            try:
                replace_directory(work, target)
            except Exception as failure:
                error = failure
        comm.agree_on_error(error, world)
    finally:
        if world.index == 0 and work.exists():
            shutil.rmtree(work, ignore_errors=True)


def _save_meta(meta: dict[str, Any], file: Path) -> None:
    torch.save(meta, file)
    # Now, rather than when somebody needs the checkpoint and it cannot be read.
    known = {f"{kind.__module__}.{kind.__qualname__}" for kind in _HARMLESS}
    foreign = sorted(set(torch.serialization.get_unsafe_globals_in_checkpoint(file)) - known)
    if foreign:
        raise CheckpointError(
            f"the checkpoint would hold a {foreign[0]}, and only plain data is ever read back; keep numbers, strings and "
            "containers of them in hyperparameters and in the state of callbacks and schedulers."
        )


def load_meta(path: str | Path) -> dict[str, Any]:
    """Everything but the tensors.

    Raises:
        CheckpointError: If the directory is no complete checkpoint.
    """
    file = Path(path) / META
    if not file.is_file():
        raise CheckpointError(f"{path} is not a checkpoint of this strategy (it has no {META}).")
    try:
        with torch.serialization.safe_globals(list(_HARMLESS)):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None


def stored_tensors(path: str | Path) -> dict[str, TensorStorageMetadata]:
    """Shapes and dtypes of all tensors in a checkpoint.

    Raises:
        CheckpointError: If the list cannot be read.
    """
    return _listed(SafeReader(path))


def _listed(reader: SafeReader) -> dict[str, TensorStorageMetadata]:
    try:
        return reader.tensors()
    except Exception as error:
        raise CheckpointError(f"{reader.path} is damaged: its list of tensors cannot be read ({error}).") from None


class StoredTensors:
    """The tensors of a checkpoint, read one at a time by a process on its own.

    Args:
        path: The checkpoint.

    Attributes:
        items: Shape and dtype of each tensor by name.

    Raises:
        CheckpointError: If the list of tensors cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self._path, self._reader = Path(path), SafeReader(path)
        self.items = _listed(self._reader)

    def read(self, name: str) -> Tensor:
        """A whole tensor.

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
    """Fills ``tensors`` in place. Collective.

    Raises:
        CheckpointError: If a tensor is missing or of another shape, or a file damaged; raised on all ranks.
    """
    _collective("read", Path(path), lambda: dcp.load(dict(tensors), storage_reader=SafeReader(path)))


def _collective(verb: str, path: Path, action: Any) -> None:
    try:
        action()
    except dcp.CheckpointException as error:  # a BaseException in torch: no ordinary handler would see it
        rank, (cause, _) = next(iter(error.failures.items()))
        raise CheckpointError(
            f"cannot {verb} {path}: rank {rank} failed with {type(cause).__name__}: {cause}"
        ) from None
    except Exception as error:
        raise CheckpointError(f"cannot {verb} {path}: {type(error).__name__}: {error}") from error

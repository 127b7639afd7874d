# SPDX-License-Identifier: Apache-2.0
"""Layout-free training checkpoints, in the files of torch.distributed.checkpoint.

A checkpoint is a directory. Tensors are stored under global names with global shapes (:mod:`.chunks`); each rank writes the
boxes it owns and reads the boxes it needs, whatever fold wrote them. Everything that is not a tensor of the model or the
optimizer is in ``meta.pt``, read with ``weights_only=True``; reading runs no code from a checkpoint. A save appears
under its name only when it is complete. A local folder is renamed at the end. A store cannot rename, so each save
writes its tensors into a new folder below the checkpoint, and finally ``meta.pt``, in one request, which names that
folder.
"""

from __future__ import annotations

import io
import uuid
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PosixPath, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from lightning_moefold import comm
from lightning_moefold.agreement import agreeing
from lightning_moefold.checkpoint import stores
from lightning_moefold.checkpoint.chunk_reader import FOLDER, FOLDERS, SUMMED
from lightning_moefold.checkpoint.chunks import TensorPiece, Written, write_chunks, write_list
from lightning_moefold.checkpoint.drafts import draft_of, publish
from lightning_moefold.checkpoint.reasons import in_one_sentence, reason_of
from lightning_moefold.checkpoint.sums import check_archive
from lightning_moefold.errors import CheckpointError
from lightning_moefold.mesh import Axis

META = "meta.pt"
#: Key of the models' descriptions: by name, a mapping of ``config`` (Hugging Face's), ``dtypes`` (on disk) and ``path``
#: (of the source, or None).
MODELS = "moefold_models"
#: Classes that hyperparameters may hold besides plain data.
_HARMLESS = (PosixPath, PurePosixPath)


@dataclass(frozen=True)
class Packed:
    """What one save writes besides tensors.

    Args:
        target: The checkpoint, a local directory or a place in a store.
        meta: Content of ``meta.pt``; empty on other ranks than the first.
        folder: Folder of the tensors, in a store.
        summed: Whether checksums are written.
    """

    target: Path | str
    meta: bytes
    folder: str
    summed: bool


def pack(path: str | Path, meta: Mapping[str, Any], world: Axis, *, summed: bool = True) -> Packed:
    """Serialises everything except the tensors, as the first rank has it. Collective.

    An existing file or directory at ``path`` is replaced once the new one is complete.

    Raises:
        CheckpointError: If ``meta`` could not be read back.
    """
    target, content = stores.parse_path(path), b""
    folder = comm.broadcast_object(FOLDERS + uuid.uuid4().hex[:8], world) if isinstance(target, str) else ""
    with agreeing(world):
        if world.index == 0:
            content = pack_meta({**meta, SUMMED: summed, **({FOLDER: folder} if folder else {})})
    return Packed(target, content, folder, summed)


def save_sharded(packed: Packed, tensors: Mapping[str, Tensor | TensorPiece], world: Axis) -> None:
    """Writes a checkpoint. Collective.

    Args:
        packed: What :func:`pack` has returned.
        tensors: :class:`TensorPiece` for tensors that are spread over ranks, plain tensors for those that this rank has whole;
            of several ranks that have one whole, the first's is kept.
        world: All ranks.

    Raises:
        CheckpointError: If writing fails; on ranks where it has not failed, PeerError. An earlier checkpoint is then unchanged.
    """
    target = packed.target
    if isinstance(target, str):
        _save_in_store(target, packed, tensors, world)
        return
    with in_one_sentence(target), draft_of(target, world) as work:
        _write_tensors(work, packed, tensors, world)
        with agreeing(world):
            if world.index == 0:
                stores.write(work / META, packed.meta)
                publish(work, target)


def _save_in_store(target: str, packed: Packed, tensors: Mapping[str, Tensor | TensorPiece], world: Axis) -> None:
    complete = False
    try:
        with agreeing(world):
            if world.index == 0 and stores.is_file(target):
                raise CheckpointError(f"{target} is a file; give another name.")
        _write_tensors(stores.join(target, packed.folder), packed, tensors, world)
        with agreeing(world), in_one_sentence(target):
            if world.index == 0:
                stores.write(stores.join(target, META), packed.meta)  # from here on, it is this save that is loaded
        complete = True
    finally:
        if world.index == 0:
            _clear(target, packed.folder, complete)


def _clear(target: str, folder: str, complete: bool) -> None:
    """Removes the tensors of earlier saves, or those of this save if it failed."""
    try:
        old = [name for name in stores.folders(target) if name.startswith(FOLDERS) and name != folder]
        for name in old if complete else [folder]:
            stores.remove(stores.join(target, name))
    except Exception as failure:  # the checkpoint itself is complete
        warnings.warn(f"unneeded folders of {target} could not be removed: {failure}", stacklevel=2)


def _write_tensors(work: Path | str, packed: Packed, tensors: Mapping[str, Tensor | TensorPiece], world: Axis) -> None:
    """Every rank writes its file, then the first rank the list of all. Two messages a rank, if nothing fails."""
    written, failure = Written(""), None
    try:
        with in_one_sentence(packed.target):
            written = write_chunks(work, world.index, tensors, packed.summed)
    except Exception as error:
        failure = error
    parts = comm.gather_objects(written if failure is None else str(failure), world)
    with agreeing(world):
        if failure is not None:
            raise failure
        if world.index == 0 and not any(isinstance(part, str) for part in parts):  # those ranks raise by themselves
            with in_one_sentence(packed.target):
                _check_files(work, packed.target, write_list(work, parts, packed.summed))


def _check_files(work: Path | str, target: Path | str, ends: Mapping[str, int]) -> None:
    """Checks that the first rank sees the files of all ranks."""
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

    Raises:
        CheckpointError: If it cannot; ``what`` is the subject of the sentence.
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
        CheckpointError: If the directory is not a complete checkpoint, or the file is damaged.
    """
    file = stores.join(stores.parse_path(path), META)
    if not stores.is_file(file):
        raise CheckpointError(f"{path} is not a checkpoint of this strategy (it has no {META}).")
    try:
        content = stores.read(file)
        check_archive(io.BytesIO(content))
        with torch.serialization.safe_globals(list(_HARMLESS)):
            meta = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{file} cannot be read: {reason_of(error)}") from None
    if not isinstance(meta, dict):
        raise CheckpointError(f"{file} cannot be read: it holds a {type(meta).__name__} instead of a checkpoint.")
    return meta

# SPDX-License-Identifier: Apache-2.0
"""Writes a Hugging Face checkpoint from parameters that are spread over ranks.

Every rank first computes the same plan of files. Each file is then written by one rank, and ranks take turns, so that
writing is spread and no rank holds the tensors of more than one file. A save appears under its name only when it is
complete.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from lightning_moefold.agreement import agree_on_error, agreeing
from lightning_moefold.checkpoint.side_files import are_apart, files_to_carry, foreign_file, warn_of_end
from lightning_moefold.checkpoint.stores import local_path
from lightning_moefold.layout import Box, split_boxes
from lightning_moefold.mesh import Axis


@dataclass(frozen=True)
class OutputTensor:
    """One parameter to write: where its pieces are, and its names on disk.

    Args:
        shape: Global shape.
        dtype: On disk.
        names: Names on disk; one, or one for each index of the first dimension.
        stacked: Whether the first dimension counts ``names``.
        owners: Rank and boxes of each piece (:meth:`~.layout.ParameterLayout.owners`); together they hold every element once.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    names: tuple[str, ...]
    stacked: bool
    owners: tuple[tuple[int, tuple[Box, ...]], ...]

    @property
    def nbytes(self) -> int:
        """Number of bytes on disk."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Merge:
    """A sum that is added to a parameter before it is written.

    Args:
        parts: Names, in the model, of the tensors from which the sum is computed.
        apply: Function of the whole parameter and the whole parts that returns the sum.
        dtype: Data type in which the parameter is passed to it.
    """

    parts: Mapping[str, OutputTensor]
    apply: Callable[[Tensor, Mapping[str, Tensor]], Tensor]
    dtype: torch.dtype


def write_hf_checkpoint(
    path: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, OutputTensor],
    piece: Callable[[str], Tensor],
    world: Axis,
    *,
    max_shard_size: int = 5_000_000_000,
    side_files_from: Path | None = None,
    tokenizer_from: Path | None = None,
    merges: Mapping[str, Merge] | None = None,
) -> None:
    """Writes the directory ``path`` with config, safetensors shards and index. Collective: every rank calls it.

    Args:
        path: Directory to create. A directory that holds a checkpoint is replaced; one that holds other files is
            refused.
        config: Content of ``config.json``.
        tensors: The parameters to write by their names in the model, the same on every rank.
        piece: Function that returns this rank's piece of a parameter, given its name.
        world: All ranks.
        max_shard_size: Bytes after which a new file is begun; a single parameter may exceed it.
        side_files_from: Directory of the model, whose other files are copied along (:mod:`.side_files`).
        tokenizer_from: Directory whose tokenizer is copied instead of the model's.
        merges: Sums that are added to some of the parameters, by name.

    Raises:
        CheckpointError: If ``path`` is in a store.
        OSError: If the directory holds other files or cannot be written; raised on every rank.
    """
    target = local_path(path, "the model's directory")
    work = draft_beside(target, world)
    files = _plan_files(tensors, max_shard_size)
    carried: dict[str, Path] = {}  # on the first rank

    def prepare() -> None:
        carried.update(files_to_carry(side_files_from, tokenizer_from))
        if tokenizer_from is not None and are_apart(side_files_from, tokenizer_from):
            warn_of_end(tokenizer_from, config, carried)
        _prepare(target, work, carried)

    on_first_rank(world, prepare)
    try:
        error: Exception | None = None
        for number, (file, members) in enumerate(files.items()):
            writer = number % world.size
            gathered: dict[str, Tensor] = {}
            for name in members:
                whole = _gather_merged(name, tensors[name], piece, (merges or {}).get(name), writer, world)
                if whole is not None:
                    gathered |= _split(tensors[name], whole)
            if gathered and error is None:
                try:
                    save_file(gathered, str(work / file), metadata={"format": "pt"})
                except Exception as failure:
                    error = failure  # kept until all ranks can hear of it; peers still send their pieces meanwhile
        agree_on_error(error, world)
        on_first_rank(world, lambda: _finish(target, work, config, tensors, files, carried))
    finally:
        if world.index == 0 and work.exists():
            shutil.rmtree(work, ignore_errors=True)


def draft_beside(target: Path, world: Axis) -> Path:
    """Returns a new name beside ``target``, the same on every rank, for a directory that will take its place. Collective."""
    names = [target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")]
    if world.size > 1:
        dist.broadcast_object_list(names, src=world.ranks[0])
    return names[0]


def on_first_rank(world: Axis, action: Callable[[], None]) -> None:
    """Does something on one rank; what it raises there is raised on all. Collective."""
    with agreeing(world):
        if world.index == 0:
            action()


def _plan_files(tensors: Mapping[str, OutputTensor], limit: int) -> dict[str, list[str]]:
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + tensor.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += tensor.nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups)}


def _prepare(target: Path, work: Path, carried: dict[str, Path]) -> None:
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file; give a directory that is new or holds a checkpoint.")
    if target.is_dir():
        foreign = foreign_file(target, carried)
        if foreign is not None:
            raise FileExistsError(
                f"{target} holds {foreign!r}, which is no part of a checkpoint; give another directory."
            )
    work.mkdir(parents=True)


def _gather_merged(
    name: str, tensor: OutputTensor, piece: Callable[[str], Tensor], merge: Merge | None, writer: int, world: Axis
) -> Tensor | None:
    """The whole tensor with what is added to it on rank ``writer``, None elsewhere."""
    if merge is None:
        return gather_whole(tensor, piece(name), writer, world)
    whole = gather_whole(replace(tensor, dtype=merge.dtype), piece(name), writer, world)
    parts = {part: gather_whole(of, piece(part), writer, world) for part, of in merge.parts.items()}
    if whole is None:
        return None
    return merge.apply(whole, {part: t for part, t in parts.items() if t is not None}).to(tensor.dtype)


def gather_whole(tensor: OutputTensor, mine: Tensor, writer: int, world: Axis) -> Tensor | None:
    """The whole tensor on rank ``writer`` (on the CPU), None elsewhere."""
    whole = torch.empty(tensor.shape, dtype=tensor.dtype) if world.index == writer else None
    for rank, boxes in tensor.owners:
        if rank == world.index == writer and whole is not None:
            _put(whole, mine.to(tensor.dtype).cpu(), boxes)
        elif rank == world.index:
            # Between CPUs, and so over gloo: NCCL would create a communicator for every pair of ranks.
            dist.send(mine.to(tensor.dtype).cpu().contiguous(), dst=world.ranks[writer], group=world.group)
        elif whole is not None:
            rows = [sum(box.sizes[0] for box in boxes)] if boxes[0].sizes else []
            part = torch.empty([*rows, *boxes[0].sizes[1:]], dtype=tensor.dtype)
            dist.recv(part, src=world.ranks[rank], group=world.group)
            _put(whole, part, boxes)
    return whole


def _put(whole: Tensor, piece: Tensor, boxes: tuple[Box, ...]) -> None:
    for box, part in zip(boxes, split_boxes(piece, boxes), strict=True):
        whole[box.slices()] = part


def _split(tensor: OutputTensor, whole: Tensor) -> dict[str, Tensor]:
    if not tensor.stacked:
        return {tensor.names[0]: whole}
    return {name: part.clone() for name, part in zip(tensor.names, whole.unbind(0), strict=True)}


def _finish(
    target: Path,
    work: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, OutputTensor],
    files: Mapping[str, Iterable[str]],
    carried: Mapping[str, Path],
) -> None:
    (work / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if len(files) > 1:
        weight_map = {disk: file for file, members in files.items() for name in members for disk in tensors[name].names}
        total = sum(tensor.nbytes for tensor in tensors.values())
        numbers = {"total_size": total, "total_parameters": sum(torch.Size(t.shape).numel() for t in tensors.values())}
        index = {"metadata": numbers, "weight_map": weight_map}
        (work / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    for name, path in carried.items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, work / name)
    replace_directory(work, target)


def replace_directory(work: Path, target: Path) -> None:
    """Replaces the directory ``target`` by the complete directory ``work``.

    On Linux the two names are exchanged in one step, so ``target`` always exists. On other systems and network file
    systems, the old directory has a hidden name for a moment, and is renamed back if the new one cannot take its place.
    """
    if not target.exists() and not target.is_symlink():
        os.replace(work, target)
        return
    if _exchange(work, target):
        _remove(work)
        return
    old = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.old")
    os.replace(target, old)
    try:
        os.replace(work, target)
    except BaseException:
        os.replace(old, target)
        raise
    _remove(old)


def _exchange(a: Path, b: Path) -> bool:
    """Exchanges two names atomically, if the system can."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2 is not None and renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()

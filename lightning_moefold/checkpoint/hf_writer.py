# SPDX-License-Identifier: Apache-2.0
"""Writes a Hugging Face checkpoint from parameters that are spread over ranks.

Every rank first computes the same plan of files. Each file is written by one rank, and files are shared out, so that all
ranks write at once: tensors are gathered for each of them in turn, and written by a thread of that rank while others are
gathered. Of a file no more is in memory than waits to be written. A save appears under its name only when it is complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_moefold.agreement import agree_on_error, agreeing
from lightning_moefold.checkpoint.drafts import draft_of, publish, sync_file
from lightning_moefold.checkpoint.hf_reader import INDEX
from lightning_moefold.checkpoint.reasons import in_one_sentence
from lightning_moefold.checkpoint.safetensors_files import PlannedFile, WritingThread
from lightning_moefold.checkpoint.side_files import are_apart, files_to_carry, foreign_file, warn_of_end
from lightning_moefold.checkpoint.stores import check_folder, local_path
from lightning_moefold.checkpoint.sums import BLOCK, CHECKSUMS, pack_sums, sum_of
from lightning_moefold.layout import Box, split_boxes
from lightning_moefold.mesh import Axis

_CONFIG = "config.json"
#: Bytes for which it pays that one more rank writes a file.
_WORTH_A_RANK = 1 << 28


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
        max_shard_size: Bytes after which a new file is begun, sooner if ranks would have none to write; a single parameter may
            exceed it.
        side_files_from: Directory of the model, whose other files are copied along (:mod:`.side_files`).
        tokenizer_from: Directory whose tokenizer is copied instead of the model's.
        merges: Sums that are added to some of the parameters, by name.

    Raises:
        CheckpointError: If ``path`` is in a store or cannot be written; on ranks where writing has not failed, PeerError. What
            was there before is then unchanged.
        OSError: If the directory holds other files.
    """
    target = local_path(path, "the model's directory")
    files = _plan_files(tensors, max_shard_size, world.size)
    carried: dict[str, Path] = {}  # on the first rank

    def prepare() -> None:
        carried.update(files_to_carry(side_files_from, tokenizer_from))
        if tokenizer_from is not None and are_apart(side_files_from, tokenizer_from):
            warn_of_end(tokenizer_from, config, carried)
        _check_target(target, carried)

    on_first_rank(world, prepare)
    with in_one_sentence(target), draft_of(target, world) as work:
        sums = _write_files(work, files, tensors, piece, merges or {}, world)
        on_first_rank(world, lambda: _finish(target, work, config, tensors, files, carried, sums))


def _write_files(
    work: Path,
    files: Mapping[str, list[str]],
    tensors: Mapping[str, OutputTensor],
    piece: Callable[[str], Tensor],
    merges: Mapping[str, Merge],
    world: Axis,
) -> dict[str, list[str]]:
    """Writes the files, as many at once as there are ranks; on the first rank returns the checksums of all tensors."""
    stride = max(1, world.size // len(files))  # fewer files than ranks are spread over the machines
    writers = {file: number * stride % world.size for number, file in enumerate(files)}
    mine = [file for file in files if writers[file] == world.index]
    thread = WritingThread([_planned(work / file, [tensors[name] for name in files[file]]) for file in mine])
    error: Exception | None = None
    try:
        for name, file in _in_turn(files, world.size):
            whole = _gather_merged(name, tensors[name], piece, merges.get(name), writers[file], world)
            if whole is not None:
                for disk, part in _split(tensors[name], whole).items():
                    thread.put(disk, part)
    finally:
        try:
            thread.finish()
        except Exception as failure:
            error = failure
    agree_on_error(error, world)
    parts: list[Any] = [thread.sums]
    if world.size > 1:
        everyone: list[Any] | None = [None] * world.size if world.index == 0 else None
        dist.gather_object(thread.sums, everyone, dst=world.ranks[0], group=world.group)
        parts = everyone or []
    return {name: sums for part in parts for name, sums in part.items()}


def _planned(path: Path, members: Iterable[OutputTensor]) -> PlannedFile:
    held: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for tensor in members:
        shape = tensor.shape[1:] if tensor.stacked else tensor.shape
        held |= dict.fromkeys(tensor.names, (tensor.dtype, shape))
    return PlannedFile(path, held)


def _in_turn(files: Mapping[str, list[str]], ranks: int) -> Iterator[tuple[str, str]]:
    """The tensors of as many files at once as there are ranks, one of each file after the other."""
    rounds = [list(files.items())[i : i + ranks] for i in range(0, len(files), ranks)]
    for together in rounds:
        for i in range(max(len(members) for _, members in together)):
            yield from ((members[i], file) for file, members in together if i < len(members))


def on_first_rank(world: Axis, action: Callable[[], None]) -> None:
    """Does something on one rank; what it raises there is raised on all. Collective."""
    with agreeing(world):
        if world.index == 0:
            action()


def _plan_files(tensors: Mapping[str, OutputTensor], limit: int, ranks: int) -> dict[str, list[str]]:
    """The tensors of each file. Large models get at least as many files as there are ranks to write them."""
    whole = sum(tensor.nbytes for tensor in tensors.values())
    limit = min(limit, max(_WORTH_A_RANK, -(-whole // ranks)))
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + tensor.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += tensor.nbytes
    for group in groups:  # larger elements first, so that all lie at multiples of their size
        group.sort(key=lambda name: -tensors[name].dtype.itemsize)
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups)}


def check_output(path: str | Path, side_files_from: Path) -> None:
    """Refuses a directory to which :func:`write_hf_checkpoint` would not write, before the work for it begins.

    Args:
        path: The directory.
        side_files_from: See :func:`write_hf_checkpoint`.

    Raises:
        CheckpointError: If it is in a store, or cannot be made.
        OSError: If it holds other files.
    """
    target = local_path(path, "the model's directory")
    check_folder(target.parent, "checkpoints")
    _check_target(target, files_to_carry(side_files_from, None))


def _check_target(target: Path, carried: dict[str, Path]) -> None:
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file; give a directory that is new or holds a checkpoint.")
    if target.is_dir():
        foreign = foreign_file(target, carried)
        if foreign is not None:
            raise FileExistsError(
                f"{target} holds {foreign!r}, which is no part of a checkpoint; give another directory."
            )


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
    return dict(zip(tensor.names, whole.unbind(0), strict=True))


def _finish(
    target: Path,
    work: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, OutputTensor],
    files: Mapping[str, Iterable[str]],
    carried: Mapping[str, Path],
    sums: dict[str, list[str]],
) -> None:
    (work / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if len(files) > 1:
        weight_map = {disk: file for file, members in files.items() for name in members for disk in tensors[name].names}
        total = sum(tensor.nbytes for tensor in tensors.values())
        numbers = {"total_size": total, "total_parameters": sum(torch.Size(t.shape).numel() for t in tensors.values())}
        index = {"metadata": numbers, "weight_map": weight_map}
        (work / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    for name, path in carried.items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, work / name)
    own = {name: sum_of((work / name).read_bytes()) for name in (_CONFIG, INDEX) if (work / name).is_file()}
    (work / CHECKSUMS).write_bytes(pack_sums({"files": own, "tensors": sums, "block": BLOCK}))
    for written in work.rglob("*"):
        if written.is_file():
            sync_file(written)
    publish(work, target)

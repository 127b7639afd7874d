# SPDX-License-Identifier: Apache-2.0
"""Writes an adapter that is spread over ranks into a directory that PEFT loads."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from lightning_moefold.adapters.files import CONFIG, TENSORS
from lightning_moefold.adapters.layout import FUSED, MIXTRAL, PREFIX, fuse, separate, stored_leaf
from lightning_moefold.checkpoint.drafts import draft_of, publish, sync_file
from lightning_moefold.checkpoint.hf_writer import OutputTensor, gather_whole, on_first_rank
from lightning_moefold.checkpoint.reasons import in_one_sentence
from lightning_moefold.checkpoint.stores import local_path
from lightning_moefold.mesh import Axis


def write_adapter(
    path: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, OutputTensor],
    piece: Callable[[str], Tensor],
    world: Axis,
    separate_names: Mapping[str, str] | None = None,
) -> None:
    """Writes ``path`` with configuration and tensors. Collective: every rank calls it.

    Args:
        path: Directory to create. A directory that holds an adapter is replaced; one that holds other files is refused.
        config: Content of ``adapter_config.json``.
        tensors: Every A and B, by our names, the same on every rank.
        piece: Function that returns this rank's piece of a parameter, given its name.
        world: All ranks.
        separate_names: Names of an expert's matrices, to write a separate adapter for each; None for fused experts.

    Raises:
        CheckpointError: If ``path`` is in a store or cannot be written; on other ranks PeerError.
        OSError: If the directory holds other files.
    """
    target = check_target(path, world)
    with in_one_sentence(target), draft_of(target, world) as work:
        whole = {name: gather_whole(tensor, piece(name), 0, world) for name, tensor in tensors.items()}

        def write() -> None:
            stored = _as_stored({name: tensor for name, tensor in whole.items() if tensor is not None}, separate_names)
            save_file(stored, str(work / TENSORS), metadata={"format": "pt"})
            (work / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
            for name in (TENSORS, CONFIG):
                sync_file(work / name)
            publish(work, target)

        on_first_rank(world, write)


def check_target(path: str | Path, world: Axis) -> Path:
    """Returns the directory of an adapter, if one may be written there. Collective.

    Raises:
        CheckpointError: If it is in a store.
        OSError: If it is a file, or holds other files than those of an adapter; on other ranks PeerError.
    """
    target = local_path(path, "the adapter's directory")
    on_first_rank(world, lambda: _check_files(target))
    return target


def _check_files(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file; give a directory that is new or holds an adapter.")
    foreign = sorted(p.name for p in target.iterdir() if p.name not in (CONFIG, TENSORS)) if target.is_dir() else []
    if foreign:
        raise FileExistsError(f"{target} holds {foreign[0]!r}, which is no part of an adapter; give another directory.")


def _as_stored(whole: Mapping[str, Tensor], separate_names: Mapping[str, str] | None) -> dict[str, Tensor]:
    """Renames tensors to the names of PEFT's file."""
    stored: dict[str, Tensor] = {}
    experts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in whole.items():
        owner, _, leaf = name.rpartition(".")
        if leaf in FUSED:
            experts.setdefault(owner, {})[leaf] = tensor
        else:
            stored[f"{PREFIX}{owner}.{stored_leaf(leaf)}"] = tensor
    for owner, parts in experts.items():
        place = f"{PREFIX}{owner}"
        stored |= fuse(place, parts) if separate_names is None else separate(place, parts, dict(separate_names))
    if separate_names == MIXTRAL:
        stored = {name.replace(".mlp.", ".block_sparse_moe."): tensor for name, tensor in stored.items()}
    return stored

# SPDX-License-Identifier: Apache-2.0
"""Positions in the data of each data rank in a checkpoint, where they differ: those of loaders with ``state_dict``.

Lightning's checkpoint has the position of one rank. It is everyone's where loaders count rows of all data ranks, as this package's
do. A streaming dataset that is split by rank, or torchdata's ``StatefulDataLoader``, has a position of its own on each data rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from lightning_moefold import comm
from lightning_moefold.errors import CheckpointError
from lightning_moefold.mesh import FoldedMesh

#: Key of the positions in a checkpoint: by data rank, :func:`_positions`.
POSITIONS = "moefold_data_positions"
_LOADERS = "combined_loader"


def gather_positions(checkpoint: dict[str, Any], trainer: pl.Trainer, mesh: FoldedMesh) -> None:
    """Adds the positions of all data ranks to Lightning's checkpoint, if they differ. Collective, where a loader has a state."""
    mine = _positions(checkpoint, trainer)
    if mesh.fold.dp == 1 or all(state is None for state in mine):  # the same kinds of loaders are on all ranks
        return
    everyone = comm.all_gather_objects((mesh.place["dp"], mine), mesh.world)
    by_data_rank = dict(reversed(everyone))  # what the first of those who share rows says counts
    positions = [by_data_rank[data_rank] for data_rank in range(mesh.fold.dp)]
    if not all(same_state(theirs, positions[0]) for theirs in positions):
        checkpoint[POSITIONS] = positions


def take_position(meta: dict[str, Any], path: Any, trainer: pl.Trainer, mesh: FoldedMesh) -> None:
    """Puts this data rank's position where Lightning looks for it, and takes the others out.

    Raises:
        CheckpointError: If the checkpoint has the positions of another number of data ranks; raised on all ranks alike.
    """
    everyone = meta.pop(POSITIONS, None)
    if everyone is None:
        return
    if len(everyone) != mesh.fold.dp:
        raise CheckpointError(
            f"{path} holds a position in the data for each of {len(everyone)} data ranks, which says nothing about {mesh.fold.dp}; "
            f"resume under a fold with dp={len(everyone)}, or train from a DataLoader with sampler=ResumableSampler(dataset)."
        )
    loaders, data = everyone[mesh.place["dp"]]
    if loaders is not None:
        meta["loops"]["fit_loop"]["state_dict"][_LOADERS] = loaders
    if data is not None:
        meta[_data_key(trainer)] = data


def _positions(checkpoint: Mapping[str, Any], trainer: pl.Trainer) -> tuple[Any, Any]:
    """Returns the states of this rank's loaders and of its data module; None for what has none."""
    loops = checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {})
    return loops.get(_LOADERS), data_module_state(checkpoint, trainer)


def data_module_state(checkpoint: Mapping[str, Any], trainer: pl.Trainer) -> Any:
    """Returns the state of the data module in a checkpoint; None if it has none."""
    return checkpoint.get(_data_key(trainer))


def _data_key(trainer: pl.Trainer) -> str:
    return type(trainer.datamodule).__qualname__  # type: ignore[attr-defined]


def same_state(first: Any, second: Any) -> bool:
    """Whether two states hold the same, tensors and arrays included."""
    (ours, form), (theirs, other) = tree_flatten(first), tree_flatten(second)
    return form == other and all(_equal(a, b) for a, b in zip(ours, theirs, strict=True))


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.equal(first, second)
    return bool(np.array_equal(first, second)) if isinstance(first, np.ndarray) else bool(first == second)

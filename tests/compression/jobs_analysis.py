# SPDX-License-Identifier: Apache-2.0
"""What ranks run for the tests of compression."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from lightning_moefold.compression.analysis import analyze
from lightning_moefold.compression.energies import Energies
from lightning_moefold.compression.expert_pruning import score_experts
from lightning_moefold.compression.stream import CalibrationRows, Computing
from lightning_moefold.fold import Fold
from lightning_moefold.mesh import FoldedMesh


def computing_under(fold: str, batch_size: int = 2) -> Computing:
    """Float64 on this rank of a pool."""
    mesh = FoldedMesh(Fold.parse(fold, dist.get_world_size()), "cpu", replicated=True)
    return Computing(mesh, torch.float64, batch_size=batch_size)


def energies_under(folds: list[str], path: str, rows: CalibrationRows, **arguments: Any) -> list[Energies]:
    """Analyses a checkpoint under several folds."""
    return [analyze(path, rows, computing_under(fold), **arguments) for fold in folds]


def scores_under(folds: list[str], path: str, rows: CalibrationRows, score: str) -> list[Any]:
    """Scores the experts of a checkpoint under several folds."""
    return [score_experts(path, rows, computing_under(fold), score=score) for fold in folds]

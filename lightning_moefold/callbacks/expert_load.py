# SPDX-License-Identifier: Apache-2.0
"""Expert loads of a run: the rows of the table, its sum over ranks, and the recorded history.

Legend: L MoE layers of the whole model, E experts, P ep ranks of one replica of the experts, R ranks of a pipeline
stage that hold different experts or replicas (edp * ep), C = E + 1 + R columns.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_moefold import comm
from lightning_moefold.callbacks.common import save_arrays, world_axis
from lightning_moefold.mesh import Axis
from lightning_moefold.models import MoECausalLM
from lightning_moefold.modules import MoELayer
from lightning_moefold.plots.files import NO_EXPERT
from lightning_moefold.strategy import MoEFoldStrategy


@dataclass(frozen=True)
class LoadRow:
    """One MoE layer of the model.

    Args:
        layer: Its number: in the whole model for a MoECausalLM, else in the order of the module tree.
        name: Name of the module in the LightningModule.
        num_experts: Its experts.
        module: The layer, or None where other ranks hold it.
    """

    layer: int
    name: str
    num_experts: int
    module: MoELayer | None


def find_rows(root: pl.LightningModule, world: Axis) -> list[LoadRow]:
    """Finds the MoE layers of the whole model; the rows are the same on every rank. Makes one collective."""
    here = {name: module for name, module in root.named_modules() if isinstance(module, MoELayer)}
    models = [m for m in root.modules() if isinstance(m, MoECausalLM)]
    numbers = {id(layer): i for model in models for i, layer in model.moe_layers().items()}
    mine = [(name, layer.num_experts, numbers.get(id(layer))) for name, layer in here.items()]
    everyone = comm.all_gather_objects(mine, world)
    layers = mine if all(theirs == mine for theirs in everyone) else sorted(set().union(*everyone), key=_natural)
    known = [number for _, _, number in layers if number is not None]
    numbers_L = known if len(models) == 1 and len(known) == len(layers) else range(len(layers))
    return [LoadRow(i, name, num, here.get(name)) for i, (name, num, _) in zip(numbers_L, layers, strict=True)]


def _natural(layer: tuple[str, int, int | None]) -> list[tuple[int, str]]:
    """Sort key for names that orders numbers by value: ``blocks.2`` before ``blocks.10``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in layer[0].split(".")]


@dataclass(frozen=True)
class ExpertLoad:
    """Expert loads of an interval, summed over all ranks.

    Args:
        rows: The MoE layers.
        counts_LE: How often each expert was chosen; :data:`NO_EXPERT` if a layer has fewer experts.
        dropped_LE: How many of these choices were dropped, 0 if a layer has fewer experts.
        rank_rows_LR: Number of rows that each rank computed, with copies of experts, without what was dropped.
    """

    rows: list[LoadRow]
    counts_LE: NDArray[np.int64]
    dropped_LE: NDArray[np.int64]
    rank_rows_LR: NDArray[np.int64]

    def by_layer(self) -> list[NDArray[np.int64]]:
        """Returns the counts of each layer's experts."""
        return [counts_E[: row.num_experts] for row, counts_E in zip(self.rows, self.counts_LE, strict=True)]

    def served_by_layer(self) -> list[NDArray[np.int64]]:
        """Returns how many choices each layer's experts have served."""
        return [
            counts_E - dropped_E[: len(counts_E)]
            for counts_E, dropped_E in zip(self.by_layer(), self.dropped_LE, strict=True)
        ]


class LoadReader:
    """Reads what the counters of all MoE layers have counted since the last time. Collective.

    The counters run on, so that others can read them, too. The sum is made here and not by a torchmetrics Metric, which would
    take a barrier and two gathers for what is one all-reduce of one table.

    Args:
        trainer: The Trainer, during a fit.
        root: The LightningModule.
    """

    def __init__(self, trainer: pl.Trainer, root: pl.LightningModule) -> None:
        self.world: Axis = world_axis(trainer)
        self.rows = find_rows(root, self.world)
        strategy = trainer.strategy
        self.device = strategy.root_device
        #: Number of replicas of the experts (edp), this rank's replica, and the parts of each (ep).
        self.replicas, self.replica, self.parts = trainer.world_size, trainer.global_rank, 1
        if isinstance(strategy, MoEFoldStrategy):
            self.replicas, self.replica, self.parts = strategy.fold.edp, strategy.mesh.place["edp"], strategy.fold.ep
        self._seen_LC = self._totals()

    @property
    def experts(self) -> int:
        """E, the largest number of experts of any layer."""
        return max((row.num_experts for row in self.rows), default=0)

    def read(self) -> ExpertLoad:
        """Sums over all ranks what was counted since the last reading. One collective; waits for the device."""
        totals_LC = self._totals()
        table_LC = comm.all_reduce_raw(totals_LC - self._seen_LC, self.world).cpu().numpy()
        self._seen_LC = totals_LC
        counts_LE = table_LC[:, : self.experts].copy()
        for row, counts_E in zip(self.rows, counts_LE, strict=True):
            counts_E[row.num_experts :] = NO_EXPERT
        return ExpertLoad(
            self.rows, counts_LE, table_LC[:, self.experts : 2 * self.experts], table_LC[:, 2 * self.experts :]
        )

    @torch.no_grad()
    def _totals(self) -> Tensor:
        """This rank's ``[L, C]``: its counts, its drops, and the rows it sends to each part of its own replica's experts.

        What copies change in the latter is added by one of the ranks that share a plan.

        Ranks of tp, cp and dp have different tokens, and stages have different layers, so sums over the world count
        each token once.
        """
        table_LC = torch.zeros(
            len(self.rows), 2 * self.experts + self.replicas * self.parts, dtype=torch.int64, device=self.device
        )
        first = 2 * self.experts + self.replica * self.parts
        for i, row in enumerate(self.rows):
            if row.module is not None:
                table_LC[i, : row.num_experts] = row.module.load_E
                table_LC[i, self.experts : self.experts + row.num_experts] = row.module.dropped_E
                table_LC[i, first : first + self.parts] = row.module.part_rows()
                if (gained_R := row.module.gained_rows()) is not None:
                    table_LC[i, first : first + self.parts] += gained_R
        return table_LC


@dataclass
class LoadHistory:
    """Expert loads over a run.

    Args:
        layers: The layers' numbers in the model.
        entries: Optimizer step and counts ``[L, E]`` of the interval that ended with it.
    """

    layers: list[int] = field(default_factory=list)
    entries: list[tuple[int, NDArray[np.int64]]] = field(default_factory=list)

    def begin(self, layers: list[int], step: int) -> None:
        """Starts a fit at ``step``; entries of an earlier fit up to that step are kept if the layers are the same."""
        self.entries = [entry for entry in self.entries if entry[0] <= step and self.layers == layers]
        self.layers = layers

    def save(self, path: Path | str) -> None:
        """Writes ``steps`` ``[N]``, ``layers`` ``[L]`` and ``counts`` ``[N, L, E]`` (int64), atomically."""
        steps, counts = zip(*self.entries, strict=True)
        arrays = {
            "steps": np.array(steps, np.int64),
            "layers": np.array(self.layers, np.int64),
            "counts": np.stack(counts),
        }
        save_arrays(path, arrays)

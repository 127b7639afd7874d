# SPDX-License-Identifier: Apache-2.0
"""Where experts lived over a run, and what each rank computed: recorded by ExpertRebalancer, drawn by ``moefold plot``.

Legend: N checks, L MoE layers, E experts, P parts (ranks of ep).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_moefold.balance.placement import Placement
from lightning_moefold.callbacks.common import save_arrays
from lightning_moefold.callbacks.expert_load import ExpertLoad
from lightning_moefold.plots.files import NO_EXPERT


@dataclass
class PlacementHistory:
    """Placements and loads of a run, an entry for each check.

    Attributes:
        first: Optimizer step with which the first interval began.
        layers: The layers' numbers in the model.
        steps: Optimizer step at which each interval ended.
        parts_NLE: Part that each expert was on in the interval; :data:`NO_EXPERT` if a layer has fewer experts.
        home_NLP: Rows that each part would have computed if every expert had stayed where a run begins.
        rows_NLP: Rows that it has computed, copies included.
    """

    first: int = 0
    layers: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    parts_NLE: list[NDArray[np.int16]] = field(default_factory=list)
    home_NLP: list[NDArray[np.int64]] = field(default_factory=list)
    rows_NLP: list[NDArray[np.int64]] = field(default_factory=list)

    def add(self, step: int, load: ExpertLoad, placements: Mapping[str, Placement]) -> None:
        """Adds the interval that ended with ``step``.

        Args:
            step: Optimizer step.
            load: Sum over all ranks of what was counted.
            placements: Placements during the interval, by name of the layer.
        """
        self.layers = [row.layer for row in load.rows]
        parts = next(iter(placements.values())).parts
        part_LE = np.full(load.counts_LE.shape, NO_EXPERT, dtype=np.int16)
        home_LP = np.zeros((len(load.rows), parts), dtype=np.int64)
        for i, (row, counts_E) in enumerate(zip(load.rows, load.by_layer(), strict=True)):
            part_LE[i, : row.num_experts] = placements[row.name].part_of_expert
            home_LP[i] = counts_E.reshape(parts, -1).sum(1)
        self.steps.append(step)
        self.parts_NLE.append(part_LE)
        self.home_NLP.append(home_LP)
        self.rows_NLP.append(load.rank_rows_LR.reshape(len(load.rows), -1, parts).sum(1))

    def save(self, path: Path | str) -> None:
        """Writes ``first``, ``steps``, ``layers``, ``parts``, ``home_rows`` and ``rows``, atomically."""
        stacks: dict[str, list[NDArray[Any]]] = {
            "parts": self.parts_NLE,
            "home_rows": self.home_NLP,
            "rows": self.rows_NLP,
        }
        lists = {"steps": self.steps, "layers": self.layers}
        arrays = {name: np.array(numbers, dtype=np.int64) for name, numbers in lists.items()}
        arrays |= {name: np.stack(stack) for name, stack in stacks.items()}
        save_arrays(path, {"first": self.first, **arrays})

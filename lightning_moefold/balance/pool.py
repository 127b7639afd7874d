# SPDX-License-Identifier: Apache-2.0
"""Placements found offline, among which a run may choose: SmartMoE's two stages (Zhai et al., USENIX ATC 2023).

The offline stage reads a trace of the same model (:func:`search_pool`) and keeps, for each layer, the few placements that
together serve its phases best. The live stage weighs them beside what its policy proposes, which is cheap, since they need no
search: a pattern that comes back is met by the placement that was found for it.

Legend: N records of a trace, L layers, C candidates, E experts.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lightning_moefold.balance.assignment import Counts
from lightning_moefold.balance.costs import BalanceCosts
from lightning_moefold.balance.fill import Layout
from lightning_moefold.balance.placement import Placement
from lightning_moefold.balance.relocate import candidates_for
from lightning_moefold.balance.trace import RoutingTrace
from lightning_moefold.errors import InputError

#: Placements that a pool holds of a layer at most.
SIZE = 4
#: Records of a trace that are looked at, evenly spaced.
_RECORDS = 16


@dataclass(frozen=True)
class PlacementPool:
    """Placements of each MoE layer of a model, best first.

    Args:
        layers: Of each layer, in their order; at least one each, all of the same experts and parts.

    Raises:
        InputError: If there is none, or they differ in experts or parts.
    """

    layers: tuple[tuple[Placement, ...], ...]

    def __post_init__(self) -> None:
        kinds = {(placement.num_experts, placement.parts) for layer in self.layers for placement in layer}
        if len(kinds) != 1 or not all(self.layers):
            raise InputError(
                "a pool of placements must have at least one of each layer, all for the same number of experts and parts; write it "
                "with moefold balance TRACE --write-pool FILE."
            )

    def by_name(self, names: Sequence[str], current: Mapping[str, Placement]) -> dict[str, tuple[Placement, ...]]:
        """The placements of each layer of a run.

        Args:
            names: The layers, in their order.
            current: Their placements now.

        Raises:
            InputError: If the pool is of another model or fold.
        """
        first = self.layers[0][0]
        here = {(p.num_experts, p.parts) for p in current.values()}
        if len(names) != len(self.layers) or here != {(first.num_experts, first.parts)}:
            found = ", ".join(f"{experts} experts over ep={parts}" for experts, parts in sorted(here))
            raise InputError(
                f"the pool holds placements of {len(self.layers)} layers of {first.num_experts} experts over ep={first.parts}, "
                f"and this run has {len(names)} layers of {found}; make it from a trace of this model with the same --ep."
            )
        return dict(zip(names, self.layers, strict=True))

    @property
    def fingerprint(self) -> int:
        """A number of 32 bits that tells pools apart."""
        return zlib.crc32(self._text().encode())

    def save(self, path: str | Path) -> None:
        """Writes a JSON file: ``parts``, and for each layer and placement the part of each expert."""
        draft = Path(path).with_name(f"{Path(path).name}.tmp")
        draft.write_text(self._text())
        draft.replace(path)

    def _text(self) -> str:
        layers = [[placement.part_of_expert for placement in layer] for layer in self.layers]
        return json.dumps({"parts": self.layers[0][0].parts, "layers": layers}) + "\n"

    @classmethod
    def load(cls, path: str | Path) -> PlacementPool:
        """Reads what :meth:`save` wrote.

        Raises:
            InputError: If the file cannot be read or is no pool.
        """
        try:
            content = json.loads(Path(path).read_text())
            parts = int(content["parts"])
            layers = [[_placement(part_E, parts) for part_E in layer] for layer in content["layers"]]
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise InputError(
                f"{path} is no pool of placements ({error}); write one with moefold balance TRACE --write-pool FILE."
            ) from error
        return cls(tuple(map(tuple, layers)))


def search_pool(
    trace: RoutingTrace, costs: BalanceCosts, parts: int, max_copies_per_rank: int, size: int = SIZE
) -> PlacementPool:
    """The offline stage: the placements that together serve a trace best, layer by layer.

    Candidates are what ``joint`` would propose for each of some evenly spaced records. One after the other, that candidate is
    taken which lowers most the predicted time of all records, each under the best placement taken so far.

    Args:
        trace: A recorded or generated trace.
        costs: Constants of the prediction.
        parts: Ranks of ep.
        max_copies_per_rank: Copies for one pass that a rank may hold.
        size: Placements to keep of a layer at most.
    """
    records = np.unique(np.linspace(0, len(trace.iterations_N) - 1, _RECORDS).astype(int))
    load_NLE = trace.counts_NLSE[records].sum(2)
    layers = range(load_NLE.shape[1])
    return PlacementPool(tuple(_best_of_layer(load_NLE[:, i], costs, parts, max_copies_per_rank, size) for i in layers))


def _best_of_layer(load_NE: Counts, costs: BalanceCosts, parts: int, slots: int, size: int) -> tuple[Placement, ...]:
    start = Placement.contiguous(load_NE.shape[1], parts)
    here_E = np.asarray(start.part_of_expert)
    found = [here_E, *(part_E for load_E in load_NE for part_E in candidates_for(load_E, here_E, costs, parts))]
    unique = list({part_E.tobytes(): part_E for part_E in found}.values())

    def score(load_E: Counts, part_E: Counts) -> int:
        layout = Layout(load_E.tolist(), part_E.tolist(), parts, costs, slots)
        return layout.score(layout.best_copies())

    score_CN = np.array([[score(load_E, part_E) for load_E in load_NE] for part_E in unique])
    kept = [int(score_CN.sum(1).argmin())]
    while len(kept) < size:
        with_each_CN = np.minimum(score_CN, score_CN[kept].min(0))
        best = int(with_each_CN.sum(1).argmin())
        if with_each_CN[best].sum() >= score_CN[kept].min(0).sum():
            break
        kept.append(best)
    return tuple(_placement(unique[i].tolist(), parts) for i in kept)


def _placement(part_E: Sequence[int], parts: int) -> Placement:
    order = sorted(range(len(part_E)), key=lambda expert: (part_E[expert], expert))
    placement = Placement(tuple(order), parts)
    if list(placement.part_of_expert) != list(part_E):
        raise ValueError(f"{len(part_E)} experts are not spread evenly over {parts} parts")
    return placement

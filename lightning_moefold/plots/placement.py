# SPDX-License-Identifier: Apache-2.0
"""Picture of a run's placement: where the experts of a layer lived, and what each rank had to compute.

Legend: N checks, P parts (ranks of ep).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_moefold.plots.balance import draw_placement, draw_rank_load
from lightning_moefold.plots.files import NO_EXPERT
from lightning_moefold.plots.lines import STEP, finish
from lightning_moefold.plots.read import Run
from lightning_moefold.plots.style import COLORS, make_figure


def draw_run_placement(run: Run) -> Any:
    """Draws the layer whose experts moved most often, or the most uneven one: its placement, and rank loads without and with it."""
    if run.placement is None:
        return None
    found = run.placement
    moved_L = (np.diff(found.parts_NLE, axis=0) != 0).sum((0, 2))
    uneven_L = (found.home_NLP.max(2) / np.maximum(found.home_NLP.mean(2), 1e-9)).mean(0)
    layer = int(moved_L.argmax()) if moved_L.any() else int(uneven_L.argmax())
    part_NE = found.parts_NLE[:, layer]
    part_NE = part_NE[:, part_NE[0] != NO_EXPERT]
    parts = found.rows_NLP.shape[2]
    rank_tall = min(4.0, max(1.6, 0.2 * parts + 0.8))
    figure, panels = make_figure(
        f"Expert placement: {run.title}", [min(8.0, max(2.2, 0.14 * part_NE.shape[1] + 1)), rank_tall, rank_tall, 2.4]
    )
    starts = np.concatenate([[found.first], found.steps[:-1]])
    draw_placement(panels[0], starts, part_NE, parts)
    why = f"{moved_L[layer]} moves, the most of any layer" if moved_L.any() else "no expert has moved in any layer"
    panels[0].set_title(f"Layer {found.layers[layer]}: rank of each expert ({why})", loc="left", fontsize=10)
    for axes, rows_NLP, name in (
        (panels[1], found.home_NLP, "if no expert had moved or been copied"),
        (panels[2], found.rows_NLP, "as computed, with moves and copies"),
    ):
        rows_NP = rows_NLP[:, layer]
        draw_rank_load(axes, starts, rows_NP)
        busiest = float((rows_NP.max(1) / np.maximum(rows_NP.mean(1), 1e-9)).mean())
        axes.set_title(f"Rows of each rank, {name}: busiest {busiest:.2f} times the mean", loc="left", fontsize=10)
    for color, rows_NLP, name in ((COLORS[1], found.home_NLP, "without"), (COLORS[0], found.rows_NLP, "with")):
        uneven_NL = rows_NLP.max(2) / np.maximum(rows_NLP.mean(2), 1e-9)
        panels[3].plot(found.steps, uneven_NL.mean(1), color=color, label=f"{name} moves and copies", linewidth=1.5)
    panels[3].axhline(1, color="0.5", linewidth=0.9, linestyle=":")
    panels[3].set_title("Busiest rank, mean of all layers", loc="left", fontsize=10)
    finish(panels[3], "busiest rank / mean")
    for axes in panels:
        axes.set(xlabel=STEP)
    return figure

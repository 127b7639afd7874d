# SPDX-License-Identifier: Apache-2.0
"""A picture of a step's pipeline: when each rank runs which pass, and how long it waits."""

from __future__ import annotations

import itertools
from typing import Any

from lightning_moefold.planner.cost.simulate import Timeline
from lightning_moefold.plots.read import Run
from lightning_moefold.plots.style import COLORS, make_figure

#: Color and name of each kind of pass.
KINDS = {"F": (COLORS[0], "forward"), "B": (COLORS[1], "backward"), "W": (COLORS[4], "gradients of weights")}
_MOST_NUMBERED = 400


def idle_shares(timeline: Timeline) -> list[float]:
    """Returns each pipeline rank's idle share of the time from the start of the first pass to the end of the last."""
    return [1 - timeline.busy(rank) / timeline.seconds for rank in range(timeline.ranks)]


def _lanes(timeline: Timeline) -> dict[int, tuple[float, float]]:
    """Returns height and offset of each event's bar in its rank's row, by ``id``; two passes of a pair share the row."""
    lanes = {id(e): (0.8, 0.0) for e in timeline.events}
    for rank in range(timeline.ranks):
        events = sorted((e for e in timeline.events if e.rank == rank), key=lambda e: e.start)
        for one, other in itertools.pairwise(events):
            if other.start < one.end:
                lanes[id(one)], lanes[id(other)] = (0.4, -0.2), (0.4, 0.2)
    return lanes


def draw_timeline(run: Run) -> Any:
    """Draws one row per pipeline rank; returns None if the run has recorded no pipeline."""
    return None if run.timeline is None else draw(run.timeline, f"Pipeline: {run.title}")


def draw(timeline: Timeline, title: str) -> Any:
    """Draws one row per pipeline rank, with micro-batch numbers; later stages of a rank have a darker edge."""
    figure, (axes,) = make_figure(title, [0.55 * timeline.ranks + 1.4], width=11)
    axes.grid(visible=False)
    numbered = len(timeline.events) <= _MOST_NUMBERED
    lanes = _lanes(timeline)
    for kind, (color, name) in KINDS.items():
        events = [e for e in timeline.events if e.op[0] == kind]
        if not events:
            continue
        later = ["black" if e.op[1] >= timeline.ranks else "white" for e in events]
        axes.barh(
            [e.rank + lanes[id(e)][1] for e in events], [1e3 * (e.end - e.start) for e in events],
            left=[1e3 * e.start for e in events],
            height=[lanes[id(e)][0] for e in events], color=color, edgecolor=later, linewidth=0.6, label=name,
        )  # fmt: skip
        for e in events if numbered else ():
            middle = 1e3 * (e.start + e.end) / 2
            axes.text(
                middle, e.rank + lanes[id(e)][1], str(e.op[2]), ha="center", va="center", fontsize=7, color="white"
            )
    shares = idle_shares(timeline)
    labels = [f"rank {rank}\n{share:.0%} idle" for rank, share in enumerate(shares)]
    axes.set_yticks(range(timeline.ranks), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_title(f"idle on average: {sum(shares) / len(shares):.1%}", loc="right", fontsize=9)
    axes.set(xlabel="milliseconds (numbers: micro-batch; black edge: a later stage of the rank)")
    axes.legend(fontsize="small", frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.3))
    return figure

# SPDX-License-Identifier: Apache-2.0
"""Pictures of expert balance: what policies would have made of a run, where experts lived, what each rank had to do.

Legend: N checks, R ranks, E experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_moefold.balance.replay import Replay
from lightning_moefold.plots.style import COLORS, make_figure, save_figure

#: Policies whose placement is drawn, the first that there is.
_SHOWN_FIRST = ("joint", "eplb", "smartmoe_greedy")
#: A rank's load is drawn up to so many times the mean.
_MOST_LOAD = 3.0


def write_balance_plots(replays: Mapping[str, Replay], trace: str, folder: str | Path) -> list[Path]:
    """Writes ``policies.png``, ``placement.png`` and ``rank_load.png``.

    Args:
        replays: By policy.
        trace: Its name, for titles.
        folder: Made if it does not exist.

    Raises:
        ValueError: If matplotlib is not installed.
    """
    shown = next((name for name in _SHOWN_FIRST if name in replays), list(replays)[-1])
    found, before = replays[shown], replays.get("contiguous", next(iter(replays.values())))
    layer = int(before.imbalance_NL.mean(0).argmax())
    figures = {
        "policies": _policies(replays, trace),
        "placement": _placement(found, f"Homes under {shown}: {trace}", int((found.moves_NL > 0).sum(0).argmax())),
        "rank_load": _rank_load(before, found, shown, trace, layer),
    }
    return [save_figure(figure, Path(folder) / f"{name}.png") for name, figure in figures.items()]


# ---- panels, for whoever has such data ----------------------------------------------------------------------------------


def draw_placement(axes: Any, steps_N: NDArray[np.int64], part_NE: NDArray[np.integer], parts: int) -> None:
    """Rank of every expert over time, a color a rank; white lines where an expert moves.

    Args:
        axes: To draw on.
        steps_N: Optimizer step of each column.
        part_NE: Home of each expert.
        parts: R.
    """
    from matplotlib import colormaps
    from matplotlib.colors import BoundaryNorm

    axes.grid(visible=False)
    experts = part_NE.shape[1]
    norm = BoundaryNorm(np.arange(parts + 1) - 0.5, 256)
    edges = step_edges(steps_N)
    image = axes.pcolormesh(
        edges, np.arange(experts + 1) - 0.5, part_NE.T, cmap=colormaps["turbo"], norm=norm, alpha=0.85
    )
    moved = np.argwhere(np.diff(part_NE, axis=0) != 0)
    for n, expert in moved if len(moved) <= 4000 else ():
        axes.plot([edges[n + 1]] * 2, [expert - 0.5, expert + 0.5], color="white", linewidth=1.6)
    axes.invert_yaxis()
    axes.set(ylabel="expert")
    axes.yaxis.get_major_locator().set_params(integer=True)
    ticks = np.arange(0, parts, -(-parts // 16))
    axes.figure.colorbar(image, ax=axes, label="rank of ep", ticks=ticks)


def draw_rank_load(axes: Any, steps_N: NDArray[np.int64], rows_NR: NDArray[np.int64]) -> None:
    """Rows of every rank over the mean, over time.

    Args:
        axes: To draw on.
        steps_N: Optimizer step of each column.
        rows_NR: Rows that each rank computes.
    """
    axes.grid(visible=False)
    mean_N1 = np.maximum(rows_NR.mean(1, keepdims=True), 1e-9)
    image = axes.pcolormesh(
        step_edges(steps_N),
        np.arange(rows_NR.shape[1] + 1) - 0.5,
        (rows_NR / mean_N1).T,
        cmap="coolwarm",
        vmin=0,
        vmax=2,
    )
    axes.invert_yaxis()
    axes.set(ylabel="rank of ep")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.figure.colorbar(image, ax=axes, label="rows / mean", extend="max")


def step_edges(steps_N: NDArray[np.int64]) -> NDArray[np.float64]:
    """Borders of columns, such that each begins at its step."""
    gap = float(np.median(np.diff(steps_N))) if len(steps_N) > 1 else 1.0
    return np.append(steps_N.astype(np.float64), steps_N[-1] + gap)


# ---- pictures -----------------------------------------------------------------------------------------------------------


def _policies(replays: Mapping[str, Replay], trace: str) -> Any:
    """How even ranks are over time, and what a step takes."""
    figure, panels = make_figure(f"Policies on {trace}", [4.0, 1.2 + 0.34 * len(replays)])
    axes = panels[0]
    for color, (name, found) in zip(itertools.cycle(COLORS), replays.items(), strict=False):
        axes.plot(found.iterations_N, found.imbalance_NL.mean(1), color=color, label=name, linewidth=1.5)
    axes.set_title("Busiest rank over the mean, average of layers", loc="left", fontsize=10)
    axes.set(xlabel="step", ylabel="max / mean", yscale="log")
    top = max(float(found.imbalance_NL.mean(1).max()) for found in replays.values())
    ticks = [tick for tick in (1, 1.1, 1.25, 1.5, 2, 3, 4, 6, 8, 12, 16, 32, 64) if tick <= max(top * 1.1, 1.25)]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(0.985, max(top * 1.15, 1.25))
    axes.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _draw_times(panels[1], replays)
    return figure


def _draw_times(axes: Any, replays: Mapping[str, Replay]) -> None:
    names = list(replays)
    parts = {"experts": "compute_seconds", "copies": "copy_seconds", "moves": "move_seconds"}
    left = np.zeros(len(names))
    for color, (part, field) in zip(COLORS, parts.items(), strict=False):
        seconds = np.array([getattr(found, field) for found in replays.values()])
        axes.barh(names, seconds * 1e3, left=left * 1e3, color=color, label=part)
        left += seconds
    for row, end in enumerate(left):
        axes.text(end * 1e3, row, f" {end * 1e3:.3g}", va="center", fontsize="small")
    axes.set_title("Experts' part of a step, all layers, predicted", loc="left", fontsize=10)
    axes.set(xlabel="milliseconds", xlim=(0, 1.1e3 * float(left.max())))
    axes.grid(visible=False, axis="y")
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _placement(found: Replay, title: str, layer: int) -> Any:
    experts, parts = found.part_NLE.shape[2], found.rows_NLR.shape[2]
    figure, panels = make_figure(title, [min(8.0, max(2.5, 0.14 * experts + 1)), 2.2])
    draw_placement(panels[0], found.iterations_N, found.part_NLE[:, layer], parts)
    often = int((found.moves_NL[:, layer] > 0).sum())
    times = f"the layer that changes most often ({often} of {len(found.iterations_N)} checks)"
    panels[0].set_title(
        f"Layer {layer}, {times if often else 'as all others: no expert moves'}", loc="left", fontsize=10
    )
    panels[0].set(xlabel="step")
    axes = panels[1]
    gap = step_edges(found.iterations_N)
    axes.bar(gap[:-1], found.moves_NL.sum(1), width=np.diff(gap) * 0.9, align="edge", color=COLORS[0])
    axes.set_title("Experts that moved, all layers", loc="left", fontsize=10)
    most = max(1.0, 1.05 * float(found.moves_NL.sum(1).max()))
    axes.set(xlabel="step", ylabel="experts", xlim=(gap[0], gap[-1]), ylim=(0, most))
    axes.yaxis.get_major_locator().set_params(integer=True)
    return figure


def _rank_load(before: Replay, after: Replay, policy: str, trace: str, layer: int) -> Any:
    parts = before.rows_NLR.shape[2]
    tall = min(5.0, max(1.9, 0.2 * parts + 0.8))
    figure, panels = make_figure(f"Rows of each rank: {trace}, layer {layer}", [tall, tall, 2.6])
    for axes, found, name in ((panels[0], before, "before, contiguous homes"), (panels[1], after, f"under {policy}")):
        draw_rank_load(axes, found.iterations_N, found.rows_NLR[:, layer])
        busiest = f"busiest rank {found.imbalance_NL[:, layer].mean():.2f} times the mean"
        axes.set_title(f"{name[0].upper()}{name[1:]}: {busiest}", loc="left", fontsize=10)
        axes.set(xlabel="step")
    most = min(_MOST_LOAD, max(float(found.imbalance_NL[:, layer].max()) for found in (before, after)))
    bins = np.linspace(0, max(most, 1.2), 49)
    for color, found, name in ((COLORS[1], before, "before"), (COLORS[0], after, f"under {policy}")):
        rows_NR = found.rows_NLR[:, layer]
        load = np.clip(rows_NR / np.maximum(rows_NR.mean(1, keepdims=True), 1e-9), 0, bins[-1])
        panels[2].hist(load.ravel(), bins=bins, color=color, alpha=0.75, label=name)
    panels[2].set_title("How often a rank had how much", loc="left", fontsize=10)
    panels[2].set(xlabel=f"rows / mean (last bar: {bins[-1]:.3g} and more)", ylabel="ranks x checks", yscale="log")
    panels[2].legend(frameon=False, fontsize="small")
    return figure

# SPDX-License-Identifier: Apache-2.0
"""Pictures of the expert load of a run.

Legend: N intervals, L MoE layers, E experts, R rows of a picture.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_moefold.plots.lines import STEP, finish
from lightning_moefold.plots.read import RecordedLoad, Run
from lightning_moefold.plots.style import COLORS, draw_heatmap, load_colors, make_figure, name_layers

FEW_LAYERS = 8
"""Up to so many are drawn as lines."""
MOST_EXPERTS = 256
"""So many have a row each in the picture over time, if those of one layer are not more."""


def imbalance(load: RecordedLoad) -> NDArray[np.float64]:
    """Returns the busiest expert's load over the mean, per interval and layer, ``[N, L]``; NaN if there is no load."""
    share_NLE = load.shares()
    return np.where(np.isfinite(share_NLE).any(-1), np.nan_to_num(share_NLE, nan=-np.inf).max(-1), np.nan)


def draw_expert_load(run: Run) -> Any:
    """Draws the load of every expert, in the latest interval and over the run, and the imbalance of each layer."""
    if run.load is None:
        return None
    load, share_NLE = run.load, run.load.shares()
    steps, layers = load.steps, load.layers
    tall = min(6.5, max(1.6, 0.22 * len(layers) + 1))
    shown = _most_uneven(share_NLE)
    figure, panels = make_figure(
        f"Expert load: {run.load_title}",
        [tall, min(6.5, max(1.8, 0.09 * len(shown) * share_NLE.shape[2] + 1)), 3.2, 2.6],
    )
    first = steps[-2] + 1 if len(steps) > 1 else None
    since = f"up to step {steps[-1]}" if first is None else f"steps {first} to {steps[-1]}"
    since = f"step {steps[-1]}" if first == steps[-1] else since
    colors = load_colors(share_NLE)  # the same in both panels
    draw_heatmap(panels[0], share_NLE[-1], [int(i) for i in layers], colors)
    idle = " (white: without load)" if np.isnan(share_NLE[-1]).any() else ""
    panels[0].set_title(f"Latest interval, {since}{idle}", loc="left", fontsize=10)
    some = f", the {len(shown)} most uneven of {len(layers)} layers" if len(shown) < len(layers) else ""
    panels[1].set_title(f"Each expert over the run{some}", loc="left", fontsize=10)
    _draw_over_time(panels[1], load, share_NLE, shown, colors)
    panels[2].set_title("Imbalance of each layer over the run", loc="left", fontsize=10)
    (_draw_imbalance if len(layers) <= FEW_LAYERS else _draw_imbalance_map)(panels[2], load)
    panels[2].set(xlabel=STEP)
    edges = _interval_edges(load)
    for axes in panels[1:3]:  # one time axis
        axes.set_xlim(edges[0], edges[-1])
    _draw_distribution(panels[3], load, share_NLE)
    return figure


def _most_uneven(share_NLE: NDArray[np.float64]) -> list[int]:
    """Returns the indices of the layers to draw over time: all, or the most uneven ones of the run."""
    _, layers, experts = share_NLE.shape
    room = max(1, MOST_EXPERTS // experts)
    if layers <= room:
        return list(range(layers))
    spread_L = np.nan_to_num(np.square(share_NLE - 1)).mean((0, 2))
    return sorted(np.argsort(-spread_L, kind="stable")[:room].tolist())


def _draw_over_time(axes: Any, load: RecordedLoad, share_NLE: NDArray[np.float64], shown: list[int], norm: Any) -> None:
    """Draws one row of colors per expert, grouped by layer."""
    axes.grid(visible=False)
    experts = share_NLE.shape[2]
    share_RN = share_NLE[:, shown].reshape(len(load.steps), -1).T
    rows = np.arange(len(share_RN) + 1) - 0.5
    image = axes.pcolormesh(_interval_edges(load), rows, share_RN, cmap="coolwarm", norm=norm)
    axes.set_yticks(
        [(i + 0.5) * experts - 0.5 for i in range(len(shown))], [f"layer {load.layers[layer]}" for layer in shown]
    )
    axes.tick_params(axis="y", length=0)
    for border in rows[::experts][1:-1]:
        axes.axhline(border, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel=STEP, ylabel=f"experts 0 to {experts - 1}")
    axes.figure.colorbar(image, ax=axes, label="load / fair share")


def _interval_edges(load: RecordedLoad) -> NDArray[np.float64]:
    """Returns the steps at which intervals begin and end."""
    ends = load.steps.astype(np.float64)
    return np.concatenate([[max(0.0, 2 * ends[0] - ends[1]) if len(ends) > 1 else 0.0], ends])


def _draw_imbalance(axes: Any, load: RecordedLoad) -> None:
    """Draws the imbalance as one line per layer."""
    uneven_NL = imbalance(load)
    marker = "o" if len(load.steps) < 15 else None
    for column, layer in enumerate(load.layers):
        axes.plot(
            load.steps, uneven_NL[:, column], linewidth=1.4, marker=marker, markersize=3.5, label=f"layer {layer}"
        )
    axes.axhline(1, color="0.5", linewidth=0.9, linestyle=":", label="balanced")
    finish(axes, "busiest expert / mean")


def _draw_imbalance_map(axes: Any, load: RecordedLoad) -> None:
    """Draws the imbalance as one row of colors per layer, for many layers."""
    axes.grid(visible=False)
    rows = np.arange(len(load.layers) + 1) - 0.5
    image = axes.pcolormesh(_interval_edges(load), rows, imbalance(load).T, cmap="viridis", vmin=1)
    name_layers(axes, load.layers.tolist(), most=12)
    axes.invert_yaxis()
    axes.set(ylabel="layer")
    axes.figure.colorbar(image, ax=axes, label="busiest expert / mean")


def _draw_distribution(axes: Any, load: RecordedLoad, share_NLE: NDArray[np.float64]) -> None:
    """Draws a histogram of experts by load, for the first and the latest interval."""
    first, last = (share[np.isfinite(share)] for share in (share_NLE[0], share_NLE[-1]))
    most = max([1.0, *first, *last])
    edges = np.linspace(0, most * 1.0001, 1 + int(np.clip(2 * last.size**0.5, 8, 40)))
    axes.hist(last, bins=edges, color=COLORS[0], alpha=0.85, label=f"interval up to step {load.steps[-1]}")
    if len(load.steps) > 1:
        axes.hist(
            first,
            bins=edges,
            histtype="step",
            color=COLORS[1],
            linewidth=1.6,
            label=f"interval up to step {load.steps[0]}",
        )
    axes.axvline(1, color="0.5", linewidth=0.9, linestyle=":")
    axes.set_title("Experts of all layers by load", loc="left", fontsize=10)
    finish(axes, "experts")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="load / fair share (0: dead, 1: balanced)")

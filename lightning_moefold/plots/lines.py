# SPDX-License-Identifier: Apache-2.0
"""Draws metrics as lines."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_moefold.plots.read import Run
from lightning_moefold.plots.style import COLORS
from lightning_moefold.plots.versions import Series

LONG = 150
"""Number of points from which a line is smoothed and drawn over its pale raw points."""
STEP = "optimizer step"


def smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the centred moving average over 2% of the points; the window is cut off at both ends."""
    reach, count = max(1, len(values) // 100), len(values)
    sums, index = np.concatenate([[0.0], np.cumsum(values)]), np.arange(count)
    first, last = np.maximum(index - reach, 0), np.minimum(index + reach + 1, count)
    return (sums[last] - sums[first]) / (last - first)


def top_of(values: NDArray[np.float64]) -> float | None:
    """Returns the top of the axis for a long falling curve, so that its first points do not flatten the rest; or None."""
    if len(values) < LONG:
        return None
    rest = values[len(values) // 50 :]
    span = rest.max() - values.min()
    top = float(rest.max() + 0.05 * span)
    return top if values.max() > top + 0.2 * span else None


def draw_series(axes: Any, series: Series, label: str, color: str, scale: float = 1.0, dashed: bool = False) -> None:
    """Draws one line: with its points if there are few, smoothed if there are many."""
    values = series.values * scale
    style = "--" if dashed else "-"
    if len(values) >= LONG:
        axes.plot(series.steps, values, color=color, alpha=0.25, linewidth=0.8)
        axes.plot(series.steps, smooth(values), color=color, linewidth=1.8, label=label, linestyle=style)
    else:
        marker = "o" if len(values) < 15 else None
        axes.plot(series.steps, values, style, color=color, linewidth=1.6, markersize=3.5, marker=marker, label=label)


def draw_versions(axes: Any, run: Run, metric: str, name: str, scale: float = 1.0, dashed: bool = False) -> None:
    """Draws a metric of every version that has it. A version has the same color in all panels, the newest the first color."""
    for version, series in run.having(metric).items():
        label = name if len(run.versions) == 1 else f"{name}, {version}" if name else version
        draw_series(axes, series, label, color_of(run, version), scale, dashed)


def color_of(run: Run, version: str) -> str:
    """Returns the color of a version in all panels."""
    return COLORS[list(run.versions)[::-1].index(version) % len(COLORS)]


def finish(axes: Any, ylabel: str, *, zero: bool = False, legend: bool = True) -> None:
    """Sets label, ticks and, if it is to have one, legend of a panel; with ``zero`` the y axis starts at zero."""
    axes.set(ylabel=ylabel)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if zero:
        axes.set_ylim(0, 1.15 * axes.get_ylim()[1])  # room for the legend
    if legend and axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize="small", edgecolor="none", framealpha=0.8)

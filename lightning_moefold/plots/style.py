# SPDX-License-Identifier: Apache-2.0
"""The style of all pictures. Needs matplotlib, which is imported when a picture is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_moefold.errors import InputError
from lightning_moefold.plots.files import NO_EXPERT

COLORS = (
    "#1f5f99", "#d1603d", "#3b8f5c", "#7b5ea7", "#b3892b", "#5aa9c9", "#a33b5e", "#8f8f8f", "#9dbf4e", "#e0a3a3",
)  # fmt: skip
"""Colors of lines and bars, in order."""


def make_figure(
    title: str, heights: Sequence[float] = (4.5,), *, width: float = 9.0, share_x: bool = False
) -> tuple[Any, list[Any]]:
    """Creates a figure with panels below each other.

    Args:
        title: Title above all panels.
        heights: Height of each panel in inches.
        width: Width of the figure in inches.
        share_x: Whether the panels share one x axis.

    Returns:
        The figure and its axes from top to bottom.

    Raises:
        ValueError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("plots need matplotlib; install lightning-moefold[plot].") from None
    figure = Figure(figsize=(width, sum(heights) + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=13)
    ratios = {"height_ratios": list(heights)}
    panels = figure.subplots(len(heights), 1, squeeze=False, sharex=share_x, gridspec_kw=ratios)[:, 0]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_prop_cycle(color=COLORS)
        axes.grid(visible=True, color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, list(panels)


def save_figure(figure: Any, path: Path) -> Path:
    """Writes a PNG and creates its folder if needed; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def draw_heatmap(axes: Any, share_LE: NDArray[np.float64], layers: Sequence[int], norm: Any = None) -> None:
    """Draws the load of each expert over its layer's mean; NaN stays white. The colours are those of ``norm``, if it is given."""
    axes.grid(visible=False)
    norm = norm or load_colors(share_LE)
    image = axes.imshow(share_LE, aspect="auto", cmap="coolwarm", norm=norm, interpolation="nearest")
    name_layers(axes, layers)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="expert", ylabel="layer")
    axes.figure.colorbar(image, ax=axes, label="load / fair share")


def name_layers(axes: Any, layers: Sequence[int], most: int = 32) -> None:
    """Writes the numbers of the layers beside their rows, of many layers at most so many numbers."""
    shown = range(0, len(layers), -(-len(layers) // most))
    axes.set_yticks(list(shown), [str(layers[i]) for i in shown])


def fair_shares(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Returns the load of each expert (the last axis) over its layer's mean; NaN if there is no load or no such expert."""
    known = np.where(counts == NO_EXPERT, np.nan, counts.astype(np.float64))
    experts = np.isfinite(known).sum(-1, keepdims=True)
    total = np.nansum(known, axis=-1, keepdims=True)
    return np.divide(known * experts, total, out=np.full_like(known, np.nan), where=total > 0)


def load_colors(share: NDArray[np.float64]) -> Any:
    """Returns the colour scale of loads: blue below the mean of 1, red from there to the largest load, at least 2."""
    from matplotlib.colors import TwoSlopeNorm

    finite = share[np.isfinite(share)]
    return TwoSlopeNorm(1.0, 0.0, max(2.0, float(finite.max()) if finite.size else 2.0))

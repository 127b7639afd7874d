# SPDX-License-Identifier: Apache-2.0
"""Loss, speed and memory over the steps of a run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_moefold.plots.lines import LONG, STEP, color_of, draw_series, draw_versions, finish, top_of
from lightning_moefold.plots.read import Run
from lightning_moefold.plots.style import COLORS, make_figure
from lightning_moefold.plots.versions import Series

_LOSS = re.compile(r"(^|[/_.])loss(_step|_epoch)?$")
_VALIDATION = re.compile(r"^(val|valid|validation|eval|test)[/_.]")
_AUXILIARY = re.compile(r"aux|z_loss|balanc")
_SPEED = (
    ("train/mfu", "MFU (%)", "%", 100.0),
    ("train/tokens_per_second", "tokens per second", "tokens/s", 1.0),
    ("train/step_time", "seconds per step", "s", 1.0),
)
_MEMORY = (
    ("train/memory_peak_gb", "peak"),
    ("train/memory_reserved_gb", "reserved"),
    ("train/memory_allocated_gb", "allocated"),
)

#: Panels in the picture of metrics that have no picture of their own.
MOST = 12
#: Metrics that say what others say, in other units.
_SAME = ("epoch", "train/tflops_per_device", "train/tokens_per_second_per_device")
#: From this ratio of values on, lines in one panel are drawn on a logarithmic axis.
_WIDE = 20.0


# ---- loss ------------------------------------------------------------------------------------------------------------


def loss_names(names: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Selects the names of training, validation and auxiliary losses."""
    losses = [name for name in names if _LOSS.search(name)]
    # If a loss is logged by step and by epoch, the steps show more.
    losses = [n for n in losses if not (n.endswith("_epoch") and n.removesuffix("_epoch") + "_step" in losses)]
    auxiliary = [name for name in losses if _AUXILIARY.search(name)]
    validation = [name for name in losses if _VALIDATION.search(name) and name not in auxiliary]
    return [n for n in losses if n not in auxiliary and n not in validation], validation, auxiliary


def draw_loss(run: Run) -> Any:
    """Draws training and validation loss over steps, and auxiliary losses below."""
    training, validation, auxiliary = loss_names(run.names())
    if not training and not validation and not auxiliary:
        return None
    main = bool(training or validation)
    figure, panels = make_figure(f"Loss: {run.title}", [4.5] * main + [2.2] * bool(auxiliary), share_x=True)
    if main:
        _draw_losses(panels[0], run, training, validation)
    only = len(auxiliary) == 1 and main  # the panel above says which run has which colour
    for name in auxiliary:
        draw_versions(panels[-1], run, name, name)
    if auxiliary:
        finish(panels[-1], auxiliary[0] if only else "auxiliary loss", legend=not only)
    panels[-1].set(xlabel=STEP)
    return figure


def _draw_losses(axes: Any, run: Run, training: Sequence[str], validation: Sequence[str]) -> None:
    single = len(run.versions) == 1
    shown: list[Series] = []
    for index, name in enumerate([*training, *validation]):
        found = run.having(name)
        shown += found.values()
        if single:
            (series,) = found.values()
            draw_series(axes, series, name, COLORS[index % len(COLORS)])
        else:
            draw_versions(axes, run, name, name, dashed=name in validation)
    finish(axes, "loss (cross-entropy: nats per token)")
    _cut_top(axes, shown)


def _cut_top(axes: Any, shown: Sequence[Series]) -> None:
    """Cuts off the first points of long curves at the top of the axis, and says so in the title."""
    tops = {id(series): top for series in shown if (top := top_of(series.values)) is not None}
    long = [series for series in shown if len(series.values) >= LONG]
    if not tops:
        return
    # Short curves, such as the validation loss, also fall steeply at first, so they do not count.
    top = max(tops.get(id(series), series.values.max()) for series in long)
    bottom = min(series.values.min() for series in shown)
    highest = max(series.values.max() for series in shown)
    axes.set_ylim(bottom - 0.04 * (top - bottom), top)
    axes.set_title(f"first values, up to {highest:.3g}, lie above", loc="left", fontsize=9, color="0.4")


# ---- speed and memory ------------------------------------------------------------------------------------------------


def draw_speed(run: Run) -> Any:
    """Draws model FLOPs utilisation, throughput and step time over steps."""
    rows = [row for row in _SPEED if run.having(row[0])]
    if not rows:
        return None
    figure, panels = make_figure(f"Speed: {run.title}", [2.4] * len(rows), share_x=True)
    for axes, (name, label, unit, scale) in zip(panels, rows, strict=True):
        found = run.having(name)
        both = name == "train/mfu" and bool(run.having("train/hfu"))
        draw_versions(axes, run, name, "MFU" if both else "", scale)
        if both:
            draw_versions(axes, run, "train/hfu", "HFU", scale, dashed=True)
        typical = {version: float(np.median(series.values)) * scale for version, series in found.items()}
        for version, value in typical.items():
            color = color_of(run, version) if len(run.versions) > 1 else "0.5"
            axes.axhline(value, color=color, linewidth=0.9, linestyle=":")
        texts = [f"{value:,.3g}" if value < 1000 else f"{value:,.0f}" for value in typical.values()]
        words = f"{'medians' if len(texts) > 1 else 'median'} {' and '.join(texts)}"
        axes.set_title(f"{words}{unit if unit == '%' else ' ' + unit}", loc="right", fontsize=9)
        finish(axes, label, zero=True, legend=axes is panels[0] or both)
    panels[-1].set(xlabel=STEP)
    return figure


def draw_memory(run: Run) -> Any:
    """Draws the memory of the fullest rank over steps."""
    rows = [row for row in _MEMORY if run.having(row[0])]
    if not rows:
        return None
    if not run.having("train/memory_reserved_gb"):  # a CPU run: current and peak size of the process
        rows = [(rows[-1][0], "resident")]
    figure, (axes,) = make_figure(f"Memory of the fullest rank: {run.title}", [3.6])
    if len(run.versions) > 1:  # one line per version, or there would be too many
        draw_versions(axes, run, rows[0][0], rows[0][1])
        rows = []
    for index, (name, label) in enumerate(rows):
        (series,) = run.having(name).values()
        draw_series(axes, series, label, COLORS[index], dashed=index > 0)
    finish(axes, "GB (10⁹ bytes)", zero=True)
    axes.set(xlabel=STEP)
    return figure


# ---- everything else -------------------------------------------------------------------------------------------------


def draw_metrics(run: Run) -> Any:
    """Draws every other metric: the learning rate, the gradient norm, and whatever the user has logged, such as ``val/acc``."""
    names = [name for name in other_names(run.names()) if any(len(s.values) > 1 for s in run.having(name).values())]
    panels = metric_panels(names)
    if not panels:
        return None
    figure, axes = make_figure(f"Other metrics: {run.title}", [1.9] * len(panels), share_x=True)
    for one, (title, members) in zip(axes, panels.items(), strict=True):
        one.set_title(title, loc="left", fontsize=10)
        if len(run.versions) > 1:  # one line per version, or there would be too many
            draw_versions(one, run, members[0], "")
        else:
            _draw_together(one, run, members)
        finish(one, "", legend=one is axes[0] or len(run.versions) == 1)
    axes[-1].set(xlabel=STEP)
    return figure


def metric_panels(names: Sequence[str]) -> dict[str, list[str]]:
    """Returns the panels of a picture by title, at most :data:`MOST`: learning rates and gradient norms share one each."""
    panels: dict[str, list[str]] = {}
    for name in names:
        title = "learning rate" if name.startswith("lr") else "gradient norm" if "grad_norm" in name else name
        panels.setdefault(title, []).append(name)
    return dict(list(panels.items())[:MOST])


def _draw_together(axes: Any, run: Run, names: Sequence[str]) -> None:
    """Draws several metrics of one version; those with equal values, such as the rates of two parameter groups, as one line."""
    lines: dict[tuple[bytes, bytes], tuple[Series, list[str]]] = {}
    for name in names:
        (series,) = run.having(name).values()
        lines.setdefault((series.steps.tobytes(), series.values.tobytes()), (series, []))[1].append(name)
    for index, (series, members) in enumerate(lines.values()):
        label = ", ".join(members) if len(names) > 1 else ""
        draw_series(axes, series, label, COLORS[index % len(COLORS)], dashed=index > 0)
    values = np.concatenate([series.values for series, _ in lines.values()])
    if len(lines) > 1 and values.min() > 0 and values.max() > _WIDE * values.min():
        axes.set_yscale("log")


def other_names(names: Sequence[str]) -> list[str]:
    """Selects the metrics that no other picture shows, the learning rate and the gradient norm first."""
    drawn = {name for name, *_ in (*_SPEED, *_MEMORY)} | {name for group in loss_names(names) for name in group}
    rest = [n for n in names if n not in drawn and n not in _SAME and not _LOSS.search(n)]
    rest = [n for n in rest if not n.startswith(("moe/", "train/hfu", "train/memory"))]
    return sorted(rest, key=lambda n: (not n.startswith("lr"), "grad_norm" not in n, n))

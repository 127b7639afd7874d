# SPDX-License-Identifier: Apache-2.0
"""Pictures of a planner search: MFU over folds, memory by part, and the DDL roofline of MoE layers. Needs matplotlib.

They are drawn from the output of ``moefold plan --json``, so a file with this output is enough.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning_moefold.errors import InputError
from lightning_moefold.plots.style import make_figure, save_figure

#: Height of one fold's bar in inches.
_ROW = 0.5
#: Height of a bar as a share of that.
_BAR = 0.42
#: Colours of kinds of time and of memory, the same in every picture and all different.
_COLORS = {
    "compute": "#1f5f99", "memory bandwidth": "#5aa9c9", "launch": "#8f8f8f", "a2a": "#a33b5e", "etp": "#e0a3a3",
    "tp": "#e8c547", "cp": "#b3892b", "pipeline messages": "#7b5ea7", "bubble": "#d9d9d9", "data parallel": "#3b8f5c",
    "recompute": "#d1603d", "host link": "#3a3a3a",
    "weights": "#1f5f99", "gradients": "#3b8f5c", "optimizer": "#b3892b", "activations": "#d1603d", "buffers": "#7b5ea7",
    "logits": "#5aa9c9",
}  # fmt: skip


def write_plots(found: Mapping[str, Any], folder: str | Path) -> list[Path]:
    """Writes ``mfu.png``, ``memory.png`` and ``roofline.png``.

    Args:
        found: Result of :func:`~.explain.result_json`.
        folder: Output folder; created if it does not exist.

    Raises:
        ValueError: If matplotlib is not installed.
    """
    job, rows = found["job"], len(found["plans"])
    subject = f"{job['model']} on {job['world_size']} x {job.get('device', job['hardware'])}"
    size = f"batch {job['global_batch_size']} x {job['sequence_length']:,} tokens, {job['precision']}"
    size += " with MasterWeights" * bool(job.get("master_weights")) + (
        f", LoRA of rank {r}" if (r := job.get("lora_rank")) else ""
    )
    bars = 1.2 + _ROW * rows
    drawings: tuple[tuple[str, str, tuple[float, ...], tuple[Callable[[Any, Mapping[str, Any]], None], ...]], ...] = (
        ("mfu", f"{subject}\n{size}", (bars, bars), (_draw_mfu, _draw_times)),
        ("memory", f"Memory of the fullest rank: {subject}\n{size}", (bars,), (_draw_memory,)),
        ("roofline", f"Roofline of the MoE layers: {subject}\n{size}", (5.2,), (_draw_roofline,)),
    )
    written = []
    for name, title, heights, draws in drawings:
        figure, panels = make_figure(title, heights)
        for axes, draw in zip(panels, draws, strict=True):
            draw(axes, found)
        written.append(save_figure(figure, Path(folder) / f"{name}.png"))
    return written


def read_plans(path: Path) -> dict[str, Any]:
    """Reads a file of ``moefold plan --json``.

    Raises:
        ValueError: If the file holds something else.
    """
    try:
        found = json.loads(path.read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict) or not found.get("plans") or "roofline" not in found["plans"][0]:
        raise InputError(f"{path} does not hold what moefold plan --json prints.")
    return found


def _name_rows(axes: Any, found: Mapping[str, Any]) -> None:
    """Writes the number, fold and settings of each plan above its bar, so that bars have the whole width."""
    for row, plan in enumerate(found["plans"]):
        text = f"{row + 1}  {plan['fold']}   {_settings(plan)}"
        axes.text(0.004, row - 0.25, text, va="bottom", fontsize="small", transform=axes.get_yaxis_transform())
    axes.set_yticks([])
    axes.grid(visible=False, axis="y")
    axes.set_ylim(len(found["plans"]) - 0.6, -0.75)


def _settings(plan: Mapping[str, Any]) -> str:
    stages = f" x{plan['num_stages_per_rank']}" if plan["num_stages_per_rank"] > 1 else ""
    parts = [f"{plan['schedule']}{stages}"] if plan["schedule"] else []
    parts += [f"recompute {plan['recompute']}"] if plan["recompute"] != "none" else []
    parts += [f"offload {plan['offload'].replace(',', ' and ')}"] if plan.get("offload", "none") != "none" else []
    parts += [f"sharding {plan['sharding']}", f"micro-batches {plan['micro_batch_size']} x {plan['num_microbatches']}"]
    return ", ".join(parts)


def _draw_mfu(axes: Any, found: Mapping[str, Any]) -> None:
    plans = found["plans"]
    colors = [_COLORS["compute"] if plan["fits"] else "0.7" for plan in plans]
    axes.barh(range(len(plans)), [100 * plan["mfu"] for plan in plans], _BAR, color=colors)
    for row, plan in enumerate(plans):
        notes = f" {plan['mfu']:.1%}, then {plan['largest_overhead']}"
        notes += "" if plan["fits"] else " (does not fit)"
        axes.text(100 * plan["mfu"], row, notes, va="center", fontsize="small")
    axes.set(
        xlabel="MFU in percent, and what takes most time besides compute",
        xlim=(0, 140 * max(p["mfu"] for p in plans)),
    )
    _name_rows(axes, found)


def _draw_times(axes: Any, found: Mapping[str, Any]) -> None:
    _stack(axes, found, "bounds_s", 1.0)
    axes.set(
        xlabel="seconds per step, by what they go to", xlim=(0, 1.03 * max(p["step_time_s"] for p in found["plans"]))
    )


def _draw_memory(axes: Any, found: Mapping[str, Any]) -> None:
    _stack(axes, found, "memory", 2.0**30)
    limit = found["plans"][0]["memory_limit_bytes"] / 2**30
    axes.axvline(
        limit, color="black", linestyle="--", label=f"limit: {limit:.1f} GiB of a rank's memory, without the reserve"
    )
    _legend_below(axes)
    axes.set(xlabel="GiB")


def _stack(axes: Any, found: Mapping[str, Any], field: str, unit: float) -> None:
    """Draws one stacked bar per plan from the parts in ``field``."""
    plans = found["plans"]
    left = [0.0] * len(plans)
    for part in dict.fromkeys(part for plan in plans for part in plan[field]):
        widths = [plan[field].get(part, 0.0) / unit for plan in plans]
        axes.barh(range(len(plans)), widths, _BAR, left=left, label=part, color=_COLORS.get(part, "0.85"))
        left = [a + b for a, b in zip(left, widths, strict=True)]
    _name_rows(axes, found)
    _legend_below(axes)


def _legend_below(axes: Any) -> None:
    axes.legend(
        fontsize="small", frameon=False, loc="upper center", bbox_to_anchor=(0.5, -60 / axes.bbox.height), ncol=5
    )


def _draw_roofline(axes: Any, found: Mapping[str, Any]) -> None:
    """Draws FasterMoE's roofline: a layer below the bends waits for its token exchange."""
    ratios = [2.0 ** (i / 4) for i in range(-12, 33)]
    top = found["job"]["gemm_efficiency"]
    axes.plot(ratios, [top * min(1, r) for r in ratios], label="exchange hidden", color="0.4")
    axes.plot(ratios, [top * r / (1 + r) for r in ratios], label="nothing hidden", color="0.4", linestyle=":")
    places: dict[tuple[tuple[float, float], ...], list[int]] = {}  # folds with the same expert mapping share a point
    for number, plan in enumerate(found["plans"], 1):
        points = tuple((min(layer["ratio"] or ratios[-1], ratios[-1]), layer["achieved"]) for layer in plan["roofline"])
        places.setdefault(points, []).append(number)
    for turn, (points, numbers) in enumerate(sorted(places.items(), key=lambda item: max(item[0]))):
        axes.scatter(*zip(*points, strict=True), s=18, zorder=3)
        axes.annotate(
            ", ".join(map(str, numbers)), max(points), textcoords="offset points", fontsize="small", ha="center",
            xytext=(0, 7 if turn % 2 else -14),  # neighbours below and above in turn, or they would overlap
        )  # fmt: skip
    axes.set(
        xscale="log",
        xlabel="seconds of expert products / seconds of token exchange, forward and backward",
        ylabel="expert FLOP/s over the peak",
    )
    axes.legend(title="one point per layer; numbers are those of the table", fontsize="small")
    axes.set_title(
        "The upper line is what the products allow if the exchange hides behind them, the lower if nothing hides.\n"
        "Points lie below where products are small, or the busiest rank has more rows than the mean.",
        loc="left", fontsize=9, color="0.4",
    )  # fmt: skip

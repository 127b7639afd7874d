# SPDX-License-Identifier: Apache-2.0
"""Pictures of a search: MFU over folds, memory by part, and the DDL roofline of a MoE layer. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_moefold.figures import make_figure, save_figure
from lightning_moefold.planner.cost import CostModel, Estimate
from lightning_moefold.planner.job import Job
from lightning_moefold.planner.search import Result


def write_plots(result: Result, folder: str | Path) -> list[Path]:
    """Writes ``mfu.png``, ``memory.png`` and ``roofline.png``.

    Args:
        result: Of a search.
        folder: Made if it does not exist.

    Raises:
        ValueError: If matplotlib is not installed.
    """
    drawings = (
        ("mfu", "Time of a step by what it is spent on", _draw_mfu),
        ("memory", "Memory of the fullest rank", _draw_memory),
        ("roofline", "Roofline of a MoE layer", _draw_roofline),
    )
    written = []
    for name, title, draw in drawings:
        figure, (axes,) = make_figure(title)
        draw(axes, result)
        written.append(save_figure(figure, Path(folder) / f"{name}.png"))
    return written


def _draw_mfu(axes: Any, result: Result) -> None:
    names = [str(e.plan.fold) for e in result.plans]
    left = [0.0] * len(names)
    for kind in dict.fromkeys(kind for e in result.plans for kind in e.bounds):
        widths = [e.bounds.get(kind, 0.0) for e in result.plans]
        axes.barh(names, widths, left=left, label=kind)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for row, estimate in enumerate(result.plans):
        axes.text(left[row], row, f" {estimate.mfu:.1%}", va="center")
    axes.set(xlabel="seconds per step (MFU at the bar's end)")
    axes.invert_yaxis()
    _legend_below(axes)


def _legend_below(axes: Any) -> None:
    axes.legend(fontsize="small", frameon=False, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.11))


def _draw_memory(axes: Any, result: Result) -> None:
    names = [str(e.plan.fold) for e in result.plans]
    left = [0.0] * len(names)
    for part in result.best.memory.as_dict():
        widths = [e.memory.as_dict()[part] / 2**30 for e in result.plans]
        axes.barh(names, widths, left=left, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.axvline(result.best.limit / 2**30, color="black", linestyle="--", label="limit")
    axes.set(xlabel="GiB on the fullest rank")
    axes.invert_yaxis()
    _legend_below(axes)


def roofline_point(job: Job, estimate: Estimate) -> tuple[float, float]:
    """A MoE layer in the DDL roofline: compute over communication, and achieved over peak FLOP/s of the experts.

    FasterMoE's diagram. Time is that of the experts and their exchange on the busiest rank, forward and backward.
    """
    plan, fold, model = estimate.plan, estimate.plan.fold, job.model
    layers = CostModel(job).layers
    tokens = layers.tokens(plan.micro_batch_size, fold.cp) // fold.tp
    block = layers.experts(fold.ep, fold.etp, tokens, plan.dispatcher)
    passes = (block.forward, block.backward)
    busy = sum(p["experts"] for p in passes)
    talk = sum(p.get("a2a", 0.0) + p.get("etp", 0.0) for p in passes)
    flops = 3 * 2 * 3 * tokens * model.num_experts_per_tok * model.hidden_size * model.moe_intermediate_size
    return busy / talk if talk else float("inf"), flops / (busy + talk) / job.hardware.peak(job.dtype)


def _draw_roofline(axes: Any, result: Result) -> None:
    job = result.job
    ratios = [2.0 ** (i / 4) for i in range(-12, 33)]
    top = job.hardware.kernels.gemm_efficiency
    axes.plot(ratios, [top * min(1, r) for r in ratios], label="exchange fully hidden")
    axes.plot(ratios, [top * r / (1 + r) for r in ratios], label="nothing hidden")
    for number, estimate in enumerate(result.plans, 1):
        ratio, achieved = roofline_point(job, estimate)
        axes.scatter(min(ratio, ratios[-1]), achieved, zorder=3)
        axes.annotate(str(number), (min(ratio, ratios[-1]), achieved), textcoords="offset points", xytext=(4, 4))
    axes.set(xscale="log", xlabel="expert compute over exchange", ylabel="expert FLOP/s over the peak")
    axes.legend(title="numbers: rank in the table")

# SPDX-License-Identifier: Apache-2.0
"""Prints plans: as a table with bars, and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_moefold.planner.cost.cost import BOUNDS, NO_FIT, Estimate
from lightning_moefold.planner.cost.roofline import roofline
from lightning_moefold.planner.report.recipe import rows_per_batch, strategy_arguments, trainer_arguments
from lightning_moefold.planner.search.job import Job
from lightning_moefold.planner.search.search import Result

#: Letter and colour of each kind of time in the bars.
STYLES: dict[str, tuple[str, str]] = {
    "compute": ("C", "green"),
    "memory bandwidth": ("m", "cyan"),
    "launch": ("l", "white"),
    "a2a": ("a", "magenta"),
    "etp": ("e", "bright_magenta"),
    "tp": ("t", "yellow"),
    "cp": ("c", "bright_yellow"),
    "pipeline messages": ("p", "bright_blue"),
    "bubble": (".", "bright_black"),
    "data parallel": ("d", "blue"),
    "recompute": ("r", "red"),
    "host link": ("h", "bright_red"),
}
assert set(STYLES) == set(BOUNDS)
#: Known models as their makers write them.
TITLES = {
    "mixtral-8x7b": "Mixtral-8x7B", "mixtral-8x22b": "Mixtral-8x22B", "qwen1.5-moe-a2.7b": "Qwen1.5-MoE-A2.7B",
    "qwen2-57b-a14b": "Qwen2-57B-A14B", "qwen3-30b-a3b": "Qwen3-30B-A3B", "qwen3-235b-a22b": "Qwen3-235B-A22B",
}  # fmt: skip
#: What a rank of a machine is called.
_DEVICES = {
    "dgx-h100": "H100", "dgx-h200": "H200", "a100": "A100", "a100-40gb": "A100 40 GB", "a800": "A800", "h800": "H800",
    "b200": "B200", "cpu": "CPU",
}  # fmt: skip
#: Fields of a job that JSON holds as they are.
_SHOWN_AS_GIVEN = (
    "global_batch_size", "sequence_length", "precision", "master_weights", "lora_rank", "quantize", "capacity_factor",
    "drop_scope", "pad_to_capacity", "dispatch_chunks",
)  # fmt: skip


# ---- JSON ------------------------------------------------------------------------------------------------------------


def plan_json(estimate: Estimate) -> dict[str, Any]:
    """Returns a plan as plain values, in seconds, bytes, and fractions between 0 and 1."""
    plan, job = estimate.plan, estimate.job
    tokens = job.global_batch_size * job.sequence_length
    return {
        "fold": str(plan.fold),
        "mfu": estimate.mfu,
        "step_time_s": estimate.step_time,
        "tokens_per_second": tokens / estimate.step_time,
        "model_tflops_per_gpu": job.model_flops / estimate.step_time / job.world_size / 1e12,
        "memory_bytes": estimate.memory.total,
        "memory_limit_bytes": estimate.limit,
        "memory": estimate.memory.as_dict(),
        "fits": estimate.fits,
        "bound_by": estimate.bound_by,
        "largest_overhead": estimate.overhead,
        "bounds_s": estimate.bounds,
        "times_s": {name: seconds for name, seconds in estimate.times.items() if seconds > 0},
        "micro_batch_size": plan.micro_batch_size,
        "num_microbatches": estimate.microbatches,
        "schedule": plan.schedule if plan.fold.pp > 1 else None,
        "num_stages_per_rank": plan.num_stages_per_rank,
        "recompute": plan.recompute,
        "offload": plan.offload,
        "host_memory_bytes": estimate.memory.host,
        "dispatcher": plan.dispatcher,
        "sharding": job.sharding,
        "busiest_rank_load": estimate.load,
        "routing": {
            name: {"step_time_s": e.step_time, "memory_bytes": e.memory.total, "fits": e.fits}
            for name, e in estimate.under.items()
        },
        "score_s": estimate.score,
        "strategy": strategy_arguments(estimate),
        "trainer": trainer_arguments(estimate),
        "batch_size_per_data_rank": rows_per_batch(estimate),
        "roofline": [asdict(point) for point in roofline(job, estimate)],
    }


def result_json(result: Result, notes: list[str], seconds: float) -> dict[str, Any]:
    """Returns the whole result of a search as plain values."""
    job = result.job
    return {
        "plans": [plan_json(e) for e in result.plans],
        "plain_expert_parallel": plan_json(result.plain) if result.plain else None,
        "pool": {name: plan_json(e) for name, e in result.pool.items()},
        "notes": notes,
        "job": {
            "model": model_title(job),
            "world_size": job.world_size,
            "hardware": job.hardware.name,
            "device": _DEVICES.get(job.hardware.name, job.hardware.name),
            "gemm_efficiency": job.hardware.kernels.gemm_efficiency,
            **{name: getattr(job, name) for name in _SHOWN_AS_GIVEN},
            "routing": job.routing.name,
            "parameters": job.model.num_parameters(),
            "active_parameters": job.model.num_parameters(active=True),
        },
        "evaluated": result.examined,
        "search_seconds": seconds,
    }


# ---- bars and tables -------------------------------------------------------------------------------------------------


def segments(estimate: Estimate, width: int = 24) -> list[tuple[str, int]]:
    """Divides ``width`` cells among the kinds of time by largest remainder, so that the cells add up."""
    kinds = [(kind, estimate.bounds.get(kind, 0.0) / estimate.step_time * width) for kind in STYLES]
    cells = {kind: int(exact) for kind, exact in kinds}
    rest = sorted(kinds, key=lambda item: item[1] - int(item[1]), reverse=True)
    for kind, _ in rest[: width - sum(cells.values())]:
        cells[kind] += 1
    return [(kind, count) for kind, count in cells.items() if count]


def time_bar(estimate: Estimate, width: int = 24) -> str:
    """Returns a bar of letters: C compute, m memory bandwidth, a all-to-all, ..."""
    return "".join(STYLES[kind][0] * count for kind, count in segments(estimate, width))


def memory_bar(estimate: Estimate) -> str:
    """Returns a bar that shows how full the fullest rank is."""
    share = estimate.memory.total / estimate.limit
    filled = min(round(share * 10), 10)
    return "#" * filled + "-" * (10 - filled) + ("!" if share > 1 else "")


def model_title(job: Job) -> str:
    """Returns the model's name as its makers write it, or the name of its directory."""
    return (
        TITLES.get(job.name) or Path(job.name).name or f"{job.model.model_type} {job.model.num_parameters() / 1e9:.1f}B"
    )


def header(job: Job) -> str:
    """Returns one line that describes the job."""
    total, active = job.model.num_parameters() / 1e9, job.model.num_parameters(active=True) / 1e9
    dropping = "dropless" if job.capacity_factor is None else f"capacity factor {job.capacity_factor:g}"
    dropping += ", padded" * job.pad_to_capacity
    dropping += f", tokens in {job.dispatch_chunks} parts" if job.dispatch_chunks > 1 else ""
    nodes = -(-job.world_size // job.hardware.gpus_per_node)
    machines = f"{nodes} node{'s' * (nodes > 1)} of {job.hardware.name}"
    ranks = f"{job.world_size} {'CPU rank' if job.hardware.device == 'cpu' else 'GPU'}{'s' * (job.world_size > 1)}"
    trained = f", LoRA of rank {job.lora_rank}" if job.lora_rank else ""
    trained += f" on a base in {job.quantize}" if job.quantize else ""
    return (
        f"{model_title(job)}, {total:.1f}B ({active:.1f}B active), on {ranks} ({machines}), "
        f"batch {job.global_batch_size} x {job.sequence_length} tokens, {job.precision}"
        f"{' with MasterWeights' * job.master_weights}{trained}, {dropping}"
    )


def answer(best: Estimate) -> str:
    """Returns the plan to run in a sentence."""
    text = (
        f"Run {describe(best)}: {_seconds(best.step_time)} per step, {best.mfu:.1%} MFU, "
        f"{best.memory.total / 2**30:.1f} of {best.limit / 2**30:.1f} GiB"
    )
    if len(best.under) < 2:
        return f"{text}, with {best.job.routing.name} routing."
    holds = [name for name, e in best.under.items() if e.fits]
    breaks = [name for name in best.under if name not in holds]
    return f"{text}; fits with {_list(holds)} routing{', not with ' + _list(breaks) if breaks else ''}."


def describe(estimate: Estimate) -> str:
    """Returns a plan with its batch and all settings."""
    plan = estimate.plan
    return f"{plan.fold}, micro-batches {plan.micro_batch_size} x {estimate.microbatches}, {_settings(estimate)}"


def _settings(estimate: Estimate) -> str:
    plan = estimate.plan
    parts = []
    if plan.fold.pp > 1:
        parts.append(plan.schedule + (f" x{plan.num_stages_per_rank}" if plan.num_stages_per_rank > 1 else ""))
    if plan.recompute != "none":
        parts.append(f"recompute {plan.recompute}")
    if plan.offload != "none":
        parts.append(f"offload {plan.offload.replace(',', ' and ')}")
    parts.append(f"sharding {estimate.job.sharding}")
    return ", ".join([*parts, plan.dispatcher] if plan.fold.ep * plan.fold.etp > 1 else parts)


def _list(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


_BEFORE = ("#", "fold", "micro-batches", "settings")
_AFTER = ("MFU", "where the time goes", "memory of limit", "bound by")


def _columns(estimates: list[Estimate]) -> tuple[str, ...]:
    """Returns the names of the columns; with several routing profiles, each has a column of seconds."""
    profiles = list(estimates[0].under)
    return (*_BEFORE, *(profiles if len(profiles) > 1 else ["step"]), *_AFTER)


def _row(estimate: Estimate) -> tuple[str, ...]:
    plan = estimate.plan
    bound = estimate.bound_by if estimate.overhead == estimate.bound_by else f"{estimate.bound_by}, {estimate.overhead}"
    gib = estimate.memory.total / 2**30
    under = list(estimate.under.values())
    steps = [_seconds(e.step_time) + "!" * (not e.fits) for e in (under if len(under) > 1 else [estimate])]
    return (
        str(plan.fold), f"{plan.micro_batch_size} x {estimate.microbatches}", _settings(estimate), *steps,
        f"{estimate.mfu:.1%}", time_bar(estimate), f"{gib:5.1f}/{estimate.limit / 2**30:.0f} GiB {memory_bar(estimate)}", bound,
    )  # fmt: skip


def table_text(estimates: list[Estimate]) -> str:
    """Returns the table as plain text, without colours."""
    rows = [_columns(estimates)] + [(str(number), *_row(e)) for number, e in enumerate(estimates, start=1)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def pool_text(result: Result) -> str:
    """Returns the pool as text: for each routing profile the plan that is fastest under it, where that is not plan 1."""
    lines = []
    for name, estimate in result.pool.items():
        if (estimate.plan, estimate.job.sharding) == (result.best.plan, result.best.job.sharding):
            continue
        mine, first = estimate.under[name], result.best.under[name]
        others = ", ".join(
            f"{other} {_seconds(e.step_time)}{'!' * (not e.fits)}"
            for other, e in estimate.under.items()
            if other != name
        )
        lines.append(
            f"if routing is {name}: {describe(estimate)} takes {_seconds(mine.step_time)} "
            f"(plan 1: {_seconds(first.step_time)}{'!' * (not first.fits)}; {others})"
        )
    return "\n".join(lines)


def legend(result: Result | None = None) -> list[str]:
    """Returns the meaning of every sign in the table, or in one time bar if there is no ``result``."""
    bar = (
        "time: "
        + ", ".join(f"{letter} {kind}" for kind, (letter, _) in STYLES.items())
        + "; each letter is an equal part"
    )
    if result is None:
        return [bar]
    profiles = list(result.best.under)
    ranking = (
        f"{', '.join(profiles)}: seconds per step with such routing, ! where the plan does not fit; plans are ranked by the mean "
        f"of these, a ! counted {NO_FIT:g} times; the other columns are for {result.job.routing.name} routing"
        if len(profiles) > 1
        else f"step: seconds with {result.job.routing.name} routing"
    )
    return [
        "fold: ranks of attention (tp tensor, cp context, dp data, pp pipeline) | of experts (etp tensor, ep experts, edp data)",
        "micro-batches: rows of one x micro-batches of a data rank in a step; settings: schedule (x stages per rank), "
        "recomputation if any, what is offloaded to host memory if anything, sharding of the data ranks, dispatcher",
        ranking,
        bar,
        "memory: of the fullest rank; # is used and - is free, a tenth each; bound by: what takes most of the time, and the "
        "largest of the rest",
    ]


def table_rich(estimates: list[Estimate]) -> Any:
    """Returns the table for a terminal, as a rich renderable.

    Raises:
        ImportError: If rich is not installed.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    columns = _columns(estimates)
    times, memory = columns.index("where the time goes"), columns.index("memory of limit")
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if len(_BEFORE) <= i < times else "left", overflow="fold")
    for number, estimate in enumerate(estimates, start=1):
        cells: list[Any] = [str(number), *_row(estimate)]
        bar = Text()
        for kind, count in segments(estimate):
            bar.append(STYLES[kind][0] * count, style=f"black on {STYLES[kind][1]}")
        cells[times] = bar
        cells[memory] = Text(cells[memory], style="" if estimate.fits else "bold red")
        table.add_row(*cells)
    return table


def gib(size: float) -> str:
    """Returns a number of bytes in GiB."""
    return f"{size / 2**30:.1f} GiB"


def _seconds(value: float) -> str:
    return f"{value:.3f} s" if value >= 0.1 else f"{value * 1e3:.2f} ms"

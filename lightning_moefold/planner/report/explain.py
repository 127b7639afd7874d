# SPDX-License-Identifier: Apache-2.0
"""Prints plans: as a table with bars, and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from lightning_moefold.fold import expert_nodes
from lightning_moefold.modules.recompute_parts import parse_recompute
from lightning_moefold.planner.cost.cost import BOUNDS, Estimate
from lightning_moefold.planner.cost.roofline import roofline
from lightning_moefold.planner.cost.routing import PROFILES
from lightning_moefold.planner.search.job import Job
from lightning_moefold.planner.search.search import Result, under_each

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
}
assert set(STYLES) == set(BOUNDS)


# ---- JSON ------------------------------------------------------------------------------------------------------------


def plan_json(job: Job, estimate: Estimate) -> dict[str, Any]:
    """Returns a plan as plain values, in seconds, bytes, and fractions between 0 and 1."""
    plan = estimate.plan
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
        "dispatcher": plan.dispatcher,
        "sharding": job.sharding,
        "busiest_rank_load": estimate.load,
        "strategy": strategy_arguments(job, estimate),
        "trainer": trainer_arguments(job, estimate),
        "batch_size_per_data_rank": rows_per_batch(job, estimate),
        "roofline": [asdict(point) for point in roofline(job, estimate)],
    }


def strategy_arguments(job: Job, estimate: Estimate) -> dict[str, Any]:
    """Returns the arguments of ``MoEFoldStrategy`` that run the plan, together with :func:`trainer_arguments`."""
    plan, fold = estimate.plan, estimate.plan.fold
    arguments: dict[str, Any] = {
        "tensor_parallel_size": fold.tp,
        "context_parallel_size": fold.cp,
        "pipeline_parallel_size": fold.pp,
        "expert_parallel_size": fold.ep,
        "expert_tensor_parallel_size": fold.etp,
    }
    arguments = {name: size for name, size in arguments.items() if size > 1}
    if fold.pp > 1:
        arguments["num_microbatches"] = estimate.microbatches
        arguments["pipeline_schedule"] = plan.schedule
        if plan.num_stages_per_rank > 1:
            arguments["num_stages_per_rank"] = plan.num_stages_per_rank
    elif estimate.microbatches > 1:  # accumulated batches: every label weighs as in the one planned batch
        arguments["calculate_per_token_loss"] = True
    by_node = expert_nodes(fold.ep, fold.etp, job.hardware.gpus_per_node) > 1 and plan.dispatcher == "hierarchical"
    optional = (
        ("dispatcher", plan.dispatcher, "alltoall"),
        ("node_size", job.hardware.gpus_per_node if by_node else None, None),
        ("capacity_factor", job.capacity_factor, None),
        ("drop_scope", job.drop_scope, "full_sequence"),
        ("pad_to_capacity", job.pad_to_capacity, False),
        ("dispatch_chunks", job.dispatch_chunks, 1),
        ("data_parallel_sharding", job.sharding, "optimizer"),
        ("recompute", parse_recompute(plan.recompute), None),
    )
    return arguments | {name: value for name, value, default in optional if value != default}


def trainer_arguments(job: Job, estimate: Estimate) -> dict[str, Any]:
    """Returns the Trainer's arguments that run the plan: its precision, and accumulation if there is no pipeline."""
    arguments: dict[str, Any] = {"precision": job.precision}
    if estimate.plan.fold.pp == 1 and estimate.microbatches > 1:
        arguments["accumulate_grad_batches"] = estimate.microbatches
    return arguments


def rows_per_batch(job: Job, estimate: Estimate) -> int:
    """Returns the number of rows of a batch on each data rank."""
    accumulated = trainer_arguments(job, estimate).get("accumulate_grad_batches", 1)
    return job.global_batch_size // (estimate.plan.fold.dp * accumulated)


def result_json(result: Result, notes: list[str], seconds: float) -> dict[str, Any]:
    """Returns the whole result of a search as plain values."""
    job = result.job
    return {
        "plans": [plan_json(job, e) for e in result.plans],
        "plain_expert_parallel": plan_json(job, result.plain) if result.plain else None,
        "pool": {name: plan_json(job, e) for name, e in result.pool.items()},
        "notes": notes,
        "job": {
            "model": f"{job.model.model_type} {job.model.num_parameters() / 1e9:.1f}B",
            "world_size": job.world_size,
            "hardware": job.hardware.name,
            "gemm_efficiency": job.hardware.kernels.gemm_efficiency,
            "global_batch_size": job.global_batch_size,
            "sequence_length": job.sequence_length,
            "precision": job.precision,
            "sharding": job.sharding,
            "capacity_factor": job.capacity_factor,
            "drop_scope": job.drop_scope,
            "pad_to_capacity": job.pad_to_capacity,
            "dispatch_chunks": job.dispatch_chunks,
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


def memory_bar(estimate: Estimate, width: int = 10) -> str:
    """Returns a bar that shows how full the fullest rank is."""
    share = estimate.memory.total / estimate.limit
    filled = min(round(share * width), width)
    return "#" * filled + "-" * (width - filled) + ("!" if share > 1 else "")


def header(job: Job) -> str:
    """Returns one line that describes the job."""
    total, active = job.model.num_parameters() / 1e9, job.model.num_parameters(active=True) / 1e9
    dropping = "dropless" if job.capacity_factor is None else f"capacity factor {job.capacity_factor:g}"
    dropping += ", padded" * job.pad_to_capacity
    dropping += f", tokens in {job.dispatch_chunks} parts" if job.dispatch_chunks > 1 else ""
    nodes = -(-job.world_size // job.hardware.gpus_per_node)
    machines = f"{nodes} node{'s' * (nodes > 1)} of {job.hardware.name}"
    ranks = f"{job.world_size} {'CPU rank' if job.hardware.device == 'cpu' else 'GPU'}{'s' * (job.world_size > 1)}"
    return (
        f"{job.model.model_type} {total:.1f}B ({active:.1f}B active) on {ranks} ({machines}), "
        f"batch {job.global_batch_size} x {job.sequence_length} tokens, {job.precision}, sharding {job.sharding}, "
        f"{dropping}, routing {job.routing.name}"
    )


_COLUMNS = ("fold", "mbs", "schedule", "recompute", "step", "MFU", "where the time goes", "memory of limit", "bound by")


def _row(estimate: Estimate) -> tuple[str, ...]:
    plan = estimate.plan
    schedule = "-" if plan.fold.pp == 1 else plan.schedule
    if plan.num_stages_per_rank > 1:
        schedule += f" x{plan.num_stages_per_rank}"
    bound = estimate.bound_by if estimate.overhead == estimate.bound_by else f"{estimate.bound_by}, {estimate.overhead}"
    gib = estimate.memory.total / 2**30
    return (
        str(plan.fold), f"{plan.micro_batch_size} x {estimate.microbatches}", schedule,
        plan.recompute, _seconds(estimate.step_time), f"{estimate.mfu:.1%}", time_bar(estimate),
        f"{gib:5.1f}/{estimate.limit / 2**30:.0f} GiB {memory_bar(estimate)}", bound,
    )  # fmt: skip


def table_text(estimates: list[Estimate], labels: list[str] | None = None) -> str:
    """Returns the table as plain text, without colours."""
    names = labels or [str(i + 1) for i in range(len(estimates))]
    rows = [("#", *_COLUMNS)] + [(name, *_row(e)) for name, e in zip(names, estimates, strict=True)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def pool_text(result: Result) -> str:
    """Returns the pool as text: seconds per step of each plan under each routing profile, ``-`` if it does not fit."""
    profiles = PROFILES | {result.job.routing.name: result.job.routing}
    names = [name for name in profiles if name in result.pool]
    plans = list(dict.fromkeys(result.pool[name].plan for name in names))
    table = under_each(plans, result.job, [profiles[name] for name in names])
    lines = ["  ".join(f"{name:>9}" for name in names) + "  plan"]
    for i, plan in enumerate(plans):
        cells = (table[name][i] for name in names)
        best = (result.pool[name].plan == plan for name in names)
        marks = (f"{e.step_time:.3f}" + "*" * b if e.fits else "-" for e, b in zip(cells, best, strict=True))
        lines.append("  ".join(f"{mark:>9}" for mark in marks) + f"  {plan}")
    return "\n".join(lines)


def legend() -> str:
    """Returns the meaning of the letters in a time bar."""
    return "mbs: rows of a micro-batch x micro-batches of a data rank; time: " + ", ".join(
        f"{letter} {kind}" for kind, (letter, _) in STYLES.items()
    )


def table_rich(estimates: list[Estimate], labels: list[str] | None = None) -> Any:
    """Returns the table for a terminal, as a rich renderable.

    Raises:
        ImportError: If rich is not installed.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    for name in ("#", *_COLUMNS):
        table.add_column(name, justify="right" if name in ("step", "MFU") else "left", overflow="fold")
    names = labels or [str(i + 1) for i in range(len(estimates))]
    for label, estimate in zip(names, estimates, strict=True):
        cells: list[Any] = list(_row(estimate))
        bar = Text()
        for kind, count in segments(estimate):
            bar.append(STYLES[kind][0] * count, style=f"black on {STYLES[kind][1]}")
        cells[6] = bar
        cells[7] = Text(cells[7], style="" if estimate.fits else "bold red")
        table.add_row(label, *cells)
    return table


def _seconds(value: float) -> str:
    return f"{value:.3f} s" if value >= 0.1 else f"{value * 1e3:.2f} ms"

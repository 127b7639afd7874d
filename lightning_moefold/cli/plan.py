# SPDX-License-Identifier: Apache-2.0
"""``moefold plan``: arguments and printing."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_moefold.errors import PlanError
from lightning_moefold.fold import Fold
from lightning_moefold.planner.cost.routing import PROFILES, find_routing
from lightning_moefold.planner.cost.simulate import simulate, write_chrome_trace
from lightning_moefold.planner.machine.hardware import PRESETS, find_hardware
from lightning_moefold.planner.report.advice import hints, why_not
from lightning_moefold.planner.report.explain import header, legend, pool_text, result_json, table_rich, table_text
from lightning_moefold.planner.report.walk import walk
from lightning_moefold.planner.search.job import (
    DISPATCHERS,
    DROP_SCOPES,
    PRECISIONS,
    RECOMPUTES,
    SCHEDULES,
    SHARDINGS,
    Job,
)
from lightning_moefold.planner.search.models_zoo import MODELS, find_model
from lightning_moefold.planner.search.search import Planner, Result, Space, search
from lightning_moefold.plots.plans import write_plots


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``moefold plan``."""
    add = parser.add_argument
    add("--model", required=True, help=f"{', '.join(MODELS)}; or a directory with a config.json")
    add("--gpus", type=int, required=True, metavar="N", help="number of ranks")
    add("--hardware", default="dgx-h100", help=f"{', '.join(PRESETS)}; or a TOML file (default: dgx-h100)")
    add("--global-batch-size", type=int, required=True, metavar="B", help="sequences per optimizer step")
    add("--sequence-length", type=int, default=4096, metavar="S", help="tokens per sequence (default: 4096)")
    add("--precision", default="bf16-mixed", choices=PRECISIONS, help="default: bf16-mixed")
    add("--sharding", default="optimizer", choices=SHARDINGS, help="data-parallel sharding (default: optimizer)")
    add("--capacity-factor", type=float, metavar="C", help="tokens an expert takes, over the mean (default: dropless)")
    add("--drop-scope", default="full_sequence", choices=DROP_SCOPES, help="of whose tokens (default: full_sequence)")
    add("--pad-to-capacity", action="store_true", help="send each expert as many rows as it may serve")
    add("--dispatch-chunks", type=int, default=1, metavar="N", help="parts in which tokens travel (default: 1)")
    add("--routing", default="balanced", help=f"{', '.join(PROFILES)}; or a recorded trace (.npz, .npy, .json)")
    add("--fold", help="evaluate this fold, such as 'tp2 pp8 | ep8', instead of searching")
    add("--explain", nargs="?", const="", metavar="FOLD", help="walk one plan line by line (the best, or that of FOLD)")
    add(
        "--micro-batch-size",
        default="auto",
        metavar="N",
        help="a number; auto; any (auto keeps it at 1 under full sharding)",
    )
    add("--schedule", choices=SCHEDULES, action="append", help="only this pipeline schedule (may be repeated)")
    add("--recompute", choices=RECOMPUTES, action="append", help="only this recomputation (may be repeated)")
    add("--dispatcher", default="alltoall", choices=(*DISPATCHERS, "any"), help="default: alltoall")
    add("--top", type=int, default=10, metavar="N", help="plans to show (default: 10)")
    add("--no-pool", action="store_true", help="do not search under the other routing profiles")
    add("--timeline", metavar="FILE", help="simulate the best plan's pipeline and write a Chrome trace")
    add("--plot", metavar="DIR", help="write pictures: MFU and time, memory, DDL roofline of a MoE layer")
    add("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Runs ``moefold plan``; returns 0 if the best plan fits, 1 if none does."""
    job = read_job(arguments)
    space = read_space(arguments, job)
    started = time.perf_counter()
    fold = arguments.fold or arguments.explain
    result = _one_fold(job, space, fold) if fold else search(job, space, arguments.top, not arguments.no_pool)
    seconds = time.perf_counter() - started
    if result.best.fits:
        notes = hints(result, space, result.best.plan.fold if fold else None)
    else:
        notes = why_not(result, space, result.best.plan.fold if fold else None)
    if arguments.timeline:
        notes.append(_write_timeline(job, result, Path(arguments.timeline)))
    if arguments.plot:
        written = write_plots(result_json(result, notes, seconds), arguments.plot)
        notes.append("Wrote " + ", ".join(map(str, written)) + ".")
    if arguments.json:
        print(json.dumps(result_json(result, notes, seconds), indent=1))
    else:
        _print(result, notes, seconds, explain=arguments.explain is not None)
    return 0 if result.best.fits else 1


def read_job(arguments: argparse.Namespace) -> Job:
    """Returns the job that the arguments describe."""
    return Job(
        find_model(arguments.model),
        arguments.gpus,
        find_hardware(arguments.hardware),
        arguments.global_batch_size,
        arguments.sequence_length,
        arguments.precision,
        arguments.sharding,
        arguments.capacity_factor,
        find_routing(arguments.routing),
        arguments.drop_scope,
        arguments.pad_to_capacity,
        arguments.dispatch_chunks,
    )


def read_space(arguments: argparse.Namespace, job: Job) -> Space:
    """Returns the settings that the arguments leave free."""
    space = Space(dispatchers=job.dispatchers if arguments.dispatcher == "any" else (arguments.dispatcher,))
    if arguments.schedule:
        space = replace(space, schedules=tuple(arguments.schedule))
    if arguments.recompute:
        space = replace(space, recomputes=tuple(r for r in RECOMPUTES if r in arguments.recompute))
    size = arguments.micro_batch_size
    if size == "any":
        return space.free
    if size != "auto":
        if not size.isdigit() or int(size) < 1:
            raise PlanError(f"--micro-batch-size {size} is neither a positive number nor auto nor any.")
        space = replace(space, micro_batch_sizes=(int(size),))
    return space


def _one_fold(job: Job, space: Space, text: str) -> Result:
    plans = Planner(job, space).evaluate(Fold.parse(text, job.world_size))
    return Result(job, plans, None, len(plans))


def _write_timeline(job: Job, result: Result, path: Path) -> str:
    timeline = simulate(job, result.best.plan)
    write_chrome_trace(timeline, path)
    return (
        f"Simulated pipeline of the best plan: {timeline.seconds:.3f} s, ranks idle {timeline.idle_fraction:.1%}; "
        f"{path} opens in chrome://tracing or ui.perfetto.dev."
    )


# ---- printing --------------------------------------------------------------------------------------------------------


def _print(result: Result, notes: list[str], seconds: float, explain: bool) -> None:
    show = _printer()
    show(header(result.job))
    if explain:
        for line in walk(result.job, result.best):
            show(line)
    else:
        show(_table(result.plans))
        show(legend())
        _print_pool(result, show)
    for note in notes:
        show(f"* {note}")
    if not explain:
        show(f"{result.examined} folds and micro-batch sizes evaluated in {seconds:.1f} s; --explain FOLD walks one")


def _print_pool(result: Result, show: Callable[[Any], None]) -> None:
    if not result.best.fits:
        return
    if result.plain and not result.plain.fits:
        show(f"plain expert parallelism ({result.plain.plan}) does not fit")
    if len({str(e.plan) for e in result.pool.values()}) > 1:
        show("pool: the best plan under each routing profile, and its seconds per step under the others")
        show(pool_text(result))


def _printer() -> Callable[[Any], None]:
    """Returns the print function of a rich console if there is a terminal and rich is installed; plain print otherwise."""
    if sys.stdout.isatty():
        try:
            from rich.console import Console
        except ImportError:
            return print
        console = Console(highlight=False, soft_wrap=False)
        return lambda what: console.print(what, markup=False) if isinstance(what, str) else console.print(what)
    return print


def _table(plans: list[Any], labels: list[str] | None = None) -> Any:
    if sys.stdout.isatty():
        try:
            return table_rich(plans, labels)
        except ImportError:
            pass
    return table_text(plans, labels)

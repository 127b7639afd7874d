# SPDX-License-Identifier: Apache-2.0
"""``moefold plan``: arguments and printing."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_moefold.errors import PlanError
from lightning_moefold.fold import Fold
from lightning_moefold.modules.quantization import QUANTIZATIONS
from lightning_moefold.planner.cost.routing import PROFILES, find_routing
from lightning_moefold.planner.cost.simulate import chrome_trace, simulate
from lightning_moefold.planner.machine.hardware import PRESETS, find_hardware
from lightning_moefold.planner.report.advice import hints, why_not
from lightning_moefold.planner.report.explain import (
    answer,
    header,
    legend,
    pool_text,
    result_json,
    table_rich,
    table_text,
)
from lightning_moefold.planner.report.recipe import lines_to_paste, write_recipe
from lightning_moefold.planner.report.walk import walk
from lightning_moefold.planner.search.job import (
    DISPATCHERS,
    DROP_SCOPES,
    OFFLOADS,
    PRECISIONS,
    RECOMPUTES,
    SCHEDULES,
    SHARDINGS,
    Job,
)
from lightning_moefold.planner.search.models_zoo import MODELS, find_model
from lightning_moefold.planner.search.robust import evaluate, search
from lightning_moefold.planner.search.search import Result
from lightning_moefold.planner.search.space import Space
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
    add("--master-weights", action="store_true", help="bf16-true with float32 copies of the weights (MasterWeights)")
    add("--lora", type=int, metavar="RANK", help="train an adapter of the attention projections instead of the model")
    add("--quantize", choices=QUANTIZATIONS, help="with --lora: store the frozen weights in 4 or 8 bits a number")
    add(
        "--routing",
        help=f"how evenly tokens choose experts: {', '.join(PROFILES)}; or a recorded trace (.npz, .npy, .json) "
        "(default: plans are ranked by all three profiles)",
    )
    add("--top", type=int, default=10, metavar="N", help="plans to show (default: 10)")
    chosen = parser.add_argument_group("settings that the search chooses unless you give them").add_argument
    chosen("--fold", help="evaluate this fold, such as 'tp2 pp8 | ep8', instead of searching")
    chosen("--micro-batch-size", default="auto", metavar="N", help="rows of a micro-batch (default: any power of two)")
    chosen("--schedule", choices=SCHEDULES, action="append", help="pipeline schedule (may be repeated)")
    chosen("--stages-per-rank", type=int, metavar="N", help="stages of a rank in interleaved schedules")
    chosen(
        "--recompute", action="append", metavar="PART[,PART]",
        help=f"{', '.join(RECOMPUTES)}, or parts of a layer (may be repeated, to choose from several)",
    )  # fmt: skip
    chosen(
        "--offload", choices=(*OFFLOADS, "any"), action="append",
        help="what to keep in host memory (may be repeated, to choose from several; default: nothing, if a plan fits without)",
    )  # fmt: skip
    chosen("--sharding", choices=SHARDINGS, help="data-parallel sharding (default: optimizer or full)")
    chosen("--dispatcher", choices=(*DISPATCHERS, "any"), help="token dispatcher (default: any)")
    moe = parser.add_argument_group("settings that change what is computed, or how tokens travel").add_argument
    moe("--capacity-factor", type=float, metavar="C", help="tokens an expert takes, over the mean (default: dropless)")
    moe("--drop-scope", default="full_sequence", choices=DROP_SCOPES, help="of whose tokens (default: full_sequence)")
    moe("--pad-to-capacity", action="store_true", help="send each expert as many rows as it may serve")
    moe("--dispatch-chunks", type=int, default=1, metavar="N", help="parts in which tokens travel (default: 1)")
    output = parser.add_argument_group("output").add_argument
    output(
        "--explain", nargs="?", const="", metavar="FOLD", help="walk one plan line by line (the best, or that of FOLD)"
    )
    output("--write-config", type=Path, metavar="FILE.yaml", help="write the plan as a configuration of moefold fit")
    output("--timeline", metavar="FILE", help="simulate the best plan's pipeline and write a Chrome trace")
    output("--plot", metavar="DIR", help="write pictures: MFU and time, memory, DDL roofline of a MoE layer")
    output("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Runs ``moefold plan``; returns 0 if the best plan fits, 1 if none does."""
    job = read_job(arguments)
    space = read_space(arguments, job)
    started = time.perf_counter()
    profiles = (job.routing,) if arguments.routing is not None else None
    text = arguments.fold or arguments.explain
    fold = Fold.parse(text, job.world_size) if text else None
    result = evaluate(job, fold, space, profiles) if fold else search(job, space, arguments.top, profiles)
    seconds = time.perf_counter() - started
    notes = hints(result, space, fold) if result.best.fits else why_not(result, space, fold)
    if arguments.write_config and result.best.fits:
        write_recipe(result.best, arguments.write_config)
        notes.append(f"Wrote {arguments.write_config}: moefold fit --config {arguments.write_config}.")
    if arguments.timeline:
        notes.append(_write_timeline(result, Path(arguments.timeline)))
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
        arguments.sharding or "optimizer",
        arguments.capacity_factor,
        find_routing("balanced" if arguments.routing is None else arguments.routing),
        arguments.drop_scope,
        arguments.pad_to_capacity,
        arguments.dispatch_chunks,
        master_weights=arguments.master_weights,
        lora_rank=arguments.lora,
        quantize=arguments.quantize,
        name=arguments.model if Path(arguments.model).is_dir() else arguments.model.lower().rsplit("/", 1)[-1],
    )


def read_space(arguments: argparse.Namespace, job: Job) -> Space:
    """Returns the settings from which to choose: what is given is kept.

    For ``--fold``, sharding and dispatcher are the strategy's defaults unless they are given. Its micro-batches are one
    sequence under full sharding, as in the published runs, unless a size is given.
    """
    one = bool(arguments.fold)
    dispatcher = arguments.dispatcher or ("alltoall" if one else "any")
    space = Space(
        dispatchers=job.dispatchers if dispatcher == "any" else (dispatcher,),
        num_stages_per_rank=arguments.stages_per_rank,
        shardings=(job.sharding,) if arguments.sharding else () if one else ("optimizer", "full"),
    )
    if arguments.schedule:
        space = replace(space, schedules=tuple(arguments.schedule))
    if arguments.offload:
        space = replace(space, offloads=tuple(name for name in OFFLOADS if {name, "any"} & set(arguments.offload)))
    if arguments.recompute:
        space = replace(space, recomputes=tuple(sorted(arguments.recompute, key=_costs_more)))
    if arguments.top < 1:
        raise PlanError(f"--top {arguments.top} must be at least 1.")
    size = arguments.micro_batch_size
    if size == "auto":
        return replace(space, micro_batch_sizes=(1,)) if one and arguments.sharding == "full" else space
    if size == "any":
        return space
    if not size.isdigit() or int(size) < 1:
        raise PlanError(f"--micro-batch-size {size} is neither a positive number nor auto nor any.")
    return replace(space, micro_batch_sizes=(int(size),))


def _costs_more(recompute: str) -> int:
    """Sorting key: kinds of recomputation from the one that takes least time, lists of parts in between."""
    return {"none": 0, "full": 2}.get(recompute, 1)


def _write_timeline(result: Result, path: Path) -> str:
    timeline = simulate(result.best.job, result.best.plan)
    path.write_text(chrome_trace(timeline))
    return (
        f"Simulated pipeline of the best plan: {timeline.seconds:.3f} s, ranks idle {timeline.idle_fraction:.1%}; "
        f"{path} opens in chrome://tracing or ui.perfetto.dev."
    )


# ---- printing --------------------------------------------------------------------------------------------------------


def _print(result: Result, notes: list[str], seconds: float, explain: bool) -> None:
    console = _console()

    def show(what: Any) -> None:
        if console is None:
            print(what)
        else:
            console.print(what, markup=not isinstance(what, str))

    show(answer(result.best) if result.best.fits else notes.pop(0))
    show(header(result.job))
    show("")
    if explain:
        for line in walk(result.best.job, result.best):
            show(line)
    else:
        show(table_text(result.plans) if console is None else table_rich(result.plans))
        for line in legend(result):
            show(line)
        if result.best.fits and result.plain and not result.plain.fits:
            show(f"plain expert parallelism ({result.plain.plan}) does not fit")
        if result.best.fits and (text := pool_text(result)):
            show(text)
    show("")
    for note in notes:
        show(f"* {note}")
    for line in lines_to_paste(result.best):
        show(line)
    if not explain:
        show("")
        show(f"{result.examined} folds and micro-batch sizes evaluated in {seconds:.1f} s; --explain FOLD walks one")


def _console() -> Any:
    """Returns a rich console if there is a terminal and rich is installed; None otherwise."""
    if not sys.stdout.isatty():
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(highlight=False, soft_wrap=False)

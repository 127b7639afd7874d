# SPDX-License-Identifier: Apache-2.0
"""``moefold balance``: arguments and printing."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_moefold.balance.costs import BalanceCosts
from lightning_moefold.balance.policies import POLICIES, Policy, make_policy
from lightning_moefold.balance.pool import PlacementPool, search_pool
from lightning_moefold.balance.replay import Replay, check_parts, replay
from lightning_moefold.balance.trace import WINDOW, RoutingTrace, read_trace
from lightning_moefold.balance.workloads import WORKLOADS, generate
from lightning_moefold.errors import InputError
from lightning_moefold.planner.machine.hardware import PRESETS, Hardware, find_hardware
from lightning_moefold.planner.search.models_zoo import MODELS, find_model
from lightning_moefold.plots.balance import write_balance_plots

#: Sizes of experts if neither the trace nor ``--model`` gives them: those of Qwen3-235B-A22B.
_HIDDEN, _WIDTH = 4096, 1536


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``moefold balance``."""
    add = parser.add_argument
    add("trace", metavar="TRACE", help=f"recorded routing (docs/balance.md has the formats), or {', '.join(WORKLOADS)}")
    add("--ep", type=int, required=True, metavar="N", help="ranks over which experts lie")
    add("--etp", type=int, default=1, metavar="N", help="ranks that share an expert (default: 1)")
    add("--edp", type=int, default=1, metavar="N", help="replicas over which optimizer states are cut (default: 1)")
    add(
        "--max-copies-per-rank",
        type=int,
        default=1,
        metavar="N",
        help="experts of others that a rank may hold (default: 1)",
    )
    add("--policies", default=",".join(POLICIES), metavar="A,B,...", help="default: all of them")
    add(
        "--model",
        help=f"whose trace it is, for the sizes of experts: {', '.join(MODELS)}; or a directory with a config.json",
    )
    add("--hardware", default="dgx-h100", help=f"{', '.join(PRESETS)}; or a TOML file (default: dgx-h100)")
    add("--precision", default="bf16", choices=("bf16", "fp32"), help="of products and copies (default: bf16)")
    add("--num-microbatches", type=int, default=1, metavar="M", help="passes that share a step's rows (default: 1)")
    add("--every", type=int, default=1, metavar="N", help="replay every Nth record only (default: 1)")
    add("--num-experts", type=int, metavar="E", help="for traces that only name the experts chosen")
    add(
        "--window",
        type=int,
        default=WINDOW,
        metavar="T",
        help=f"tokens of a check in a table of expert ids (default: {WINDOW})",
    )
    add("--pool", metavar="FILE", help="placements of --write-pool that every policy may choose as well")
    add(
        "--write-pool",
        metavar="FILE",
        help="search the placements that serve this trace best, for ExpertRebalancer(pool=FILE)",
    )
    add("--plot", metavar="DIR", help="write pictures: policies over time, homes over time, load of ranks")
    add("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Runs ``moefold balance``."""
    trace, hardware = read(arguments), find_hardware(arguments.hardware)
    costs = _costs(arguments, trace, hardware)
    pool = PlacementPool.load(arguments.pool) if arguments.pool else None
    if arguments.write_pool:
        Path(arguments.write_pool).parent.mkdir(parents=True, exist_ok=True)  # fails before anything is computed
    policies = _policies(arguments.policies, arguments.max_copies_per_rank)
    replays = {name: replay(trace, policy, costs, arguments.ep, pool=pool) for name, policy in policies.items()}
    notes = []
    if arguments.write_pool:
        found = search_pool(trace, costs, arguments.ep, arguments.max_copies_per_rank)
        found.save(arguments.write_pool)
        notes.append(
            f"Wrote {sum(map(len, found.layers))} placements of {trace.layers} layers to {arguments.write_pool}."
        )
    if arguments.plot:
        written = write_balance_plots(replays, f"{trace.name}, ep={arguments.ep}", arguments.plot)
        notes.append("Wrote " + ", ".join(map(str, written)) + ".")
    if arguments.json:
        print(json.dumps(result_json(trace, arguments.ep, replays, costs), indent=1))
        return 0
    print(_header(trace, arguments, costs))
    print(result_table(replays))
    for note in [*_hints(replays), *notes]:
        print(f"* {note}")
    return 0


def read(arguments: argparse.Namespace) -> RoutingTrace:
    """Reads or generates the trace that the arguments name; with several micro-batches, its rows are those of one.

    Raises:
        InputError: If arguments contradict each other.
    """
    for name in ("etp", "edp", "max_copies_per_rank", "num_microbatches", "every", "window"):
        if (value := getattr(arguments, name)) < 1:
            option = "--" + name.replace("_", "-")
            more = "; to see moves alone, use --policies contiguous,smartmoe_greedy" if "copies" in name else ""
            raise InputError(f"{option} {value} must be at least 1{more}.")
    if arguments.trace in WORKLOADS:
        trace = generate(arguments.trace)
    else:
        trace = read_trace(arguments.trace, arguments.num_experts, arguments.window)
    check_parts(trace.experts, arguments.ep)
    if arguments.model:
        trace = _of_model(trace, arguments.model)
    counts = trace.counts_NLSE[:: arguments.every] // arguments.num_microbatches
    return replace(trace, iterations_N=trace.iterations_N[:: arguments.every], counts_NLSE=counts)


def _of_model(trace: RoutingTrace, name: str) -> RoutingTrace:
    model = find_model(name)
    if (trace.experts, trace.layers) != (model.num_experts, model.num_moe_layers):
        raise InputError(
            f"{trace.name} has {trace.layers} layers of {trace.experts} experts, {name} has {model.num_moe_layers} of "
            f"{model.num_experts}; give the trace's own model, or leave --model out."
        )
    return replace(trace, hidden_size=model.hidden_size, expert_width=model.moe_intermediate_size)


def _policies(text: str, most_copies: int) -> dict[str, Policy]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise InputError(f"--policies names none; use {', '.join(POLICIES)}.")
    return {name: make_policy(name, most_copies) for name in names}


def _costs(arguments: argparse.Namespace, trace: RoutingTrace, hardware: Hardware) -> BalanceCosts:
    costs = BalanceCosts.of(
        hardware, trace.hidden_size or _HIDDEN, trace.expert_width or _WIDTH, parts=arguments.ep, etp=arguments.etp,
        edp=arguments.edp, dtype=arguments.precision,
    )  # fmt: skip
    return replace(costs, passes=arguments.num_microbatches)


# ---- printing --------------------------------------------------------------------------------------------------------


def result_json(trace: RoutingTrace, parts: int, replays: dict[str, Replay], costs: BalanceCosts) -> dict[str, Any]:
    """Returns the output of ``--json``, in bytes, seconds, and shares from 0 to 1."""
    return {
        "trace": {
            "name": trace.name, "checks": len(trace.iterations_N), "layers": trace.layers, "experts": trace.experts,
            "ep": parts, "break_even_rows": costs.break_even_rows,
        },
        "policies": [
            {
                "policy": name, "imbalance": found.imbalance, "moved_bytes": found.moved_bytes,
                "migrating_checks": found.migrating_checks(), "step_time_s": found.step_seconds,
                "copied_bytes_per_step": found.copied_bytes, "copies_per_pass": float(found.copies_NL.mean()),
                "moves": int(found.moves_NL.sum()), "compute_s": found.compute_seconds, "copies_s": found.copy_seconds,
                "moves_s": found.move_seconds,
            }
            for name, found in replays.items()
        ],
    }  # fmt: skip


def result_table(replays: dict[str, Replay]) -> str:
    """Returns a table with one row per policy."""
    head = (
        "policy", "max/mean", "step ms", "experts", "copies", "moves", "copies a pass", "GB copied/step", "moved", "GB moved",
        "checks that move",
    )  # fmt: skip
    rows = [head] + [
        (
            name, f"{found.imbalance:.3f}", f"{found.step_seconds * 1e3:.2f}", f"{found.compute_seconds * 1e3:.2f}",
            f"{found.copy_seconds * 1e3:.2f}", f"{found.move_seconds * 1e3:.2f}", f"{found.copies_NL.mean():.1f}",
            f"{found.copied_bytes / 1e9:.2f}", f"{found.moves_NL.sum()}", f"{found.moved_bytes / 1e9:.2f}",
            f"{found.migrating_checks():.1%}",
        )
        for name, found in replays.items()
    ]  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _header(trace: RoutingTrace, arguments: argparse.Namespace, costs: BalanceCosts) -> str:
    said = "of the trace" if trace.hidden_size else "assumed, --model says others"
    steps = trace.iterations_N
    return (
        f"{trace.name}: {len(steps)} checks (steps {steps[0]} to {steps[-1]}), {trace.layers} layers, {trace.experts} experts on "
        f"ep={arguments.ep}, etp={arguments.etp}\n"
        f"experts of {trace.hidden_size or _HIDDEN} x {trace.expert_width or _WIDTH} ({said}) on {arguments.hardware}: a copy pays "
        f"from {costs.break_even_rows} rows on; at most {arguments.max_copies_per_rank} a rank\n"
        "step: predicted time of the experts of all layers, with copies and moves; slow decisions see loads at least 10 steps old"
    )


def _hints(replays: dict[str, Replay]) -> list[str]:
    best = min(replays, key=lambda name: replays[name].step_seconds)
    base = replays.get("contiguous")
    if base is None or len(replays) == 1:
        return []
    gain = 1 - replays[best].step_seconds / base.step_seconds
    if gain < 0.01:
        return ["No policy gains 1% of the experts' time: leave balance off."]
    return [f"{best} is the fastest: {gain:.0%} less time in the experts than contiguous homes without copies."]

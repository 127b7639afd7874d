# SPDX-License-Identifier: Apache-2.0
"""Policies of expert balance on a recorded run and on named workloads; and what planning costs.

    python benchmarks/balance.py replay TRACE.npz            # every policy at ep 4, 8, 16, 0 to 8 copies a rank
    python benchmarks/balance.py workloads                   # the generator's workloads at ep 8
    python benchmarks/balance.py planner                     # time of plans up to 256 experts, 64 ranks, 64 layers
    python benchmarks/balance.py idle                        # what balance costs where routing is balanced already

The slow loop sees loads that are at least ten iterations old (in a trace that holds every fiftieth: fifty), the fast one those of
the pass. Times are predicted by the machine model, moves and copies included; nothing is measured on a GPU here.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from lightning_moefold.balance.assignment import at_home, pass_time
from lightning_moefold.balance.costs import BalanceCosts
from lightning_moefold.balance.fast import ExpertCopies
from lightning_moefold.balance.fill import plan_copies
from lightning_moefold.balance.placement import Placement
from lightning_moefold.balance.policies import Policy, make_policy
from lightning_moefold.balance.policies.joint import Joint
from lightning_moefold.balance.relocate import relocated
from lightning_moefold.balance.replay import replay
from lightning_moefold.balance.slow import LAST, SlowLoop
from lightning_moefold.balance.trace import RoutingTrace, read_trace
from lightning_moefold.balance.workloads import WORKLOADS, generate
from lightning_moefold.planner.machine.hardware import find_hardware

#: Sizes of an expert, of Qwen3-235B-A22B; which they are hardly matters, as a copy and a row grow alike.
HIDDEN, WIDTH = 4096, 1536


def contenders(slots: int) -> Iterator[tuple[str, Policy]]:
    """Every policy that ``slots`` copies a rank make a difference to; all others at 0."""
    if slots == 0:
        for name in ("contiguous", "smartmoe_greedy"):
            yield name, make_policy(name, 0)
        yield "joint (homes only)", Joint(0)
        return
    for name in ("eplb", "flexmoe", "fastermoe_shadow", "llep"):
        yield name, make_policy(name, slots)
    yield "joint, slow off", Joint(slots, slow=False)
    yield "joint, fast off", Joint(slots, fast=False)
    yield "joint", Joint(slots)


def costs_of(hardware: str, parts: int) -> BalanceCosts:
    return BalanceCosts.of(find_hardware(hardware), HIDDEN, WIDTH, parts=parts)


def table(trace: RoutingTrace, costs: BalanceCosts, parts: int, slots: int) -> None:
    for name, policy in contenders(slots):
        found = replay(trace, policy, costs, parts)
        late = found.imbalance_NL[found.iterations_N >= 1000]
        print(
            f"| {trace.name} | {parts} | {slots} | {name} | {found.imbalance:.3f} | "
            f"{f'{late.mean():.3f}' if late.size else ''} | {found.copies_NL.mean():.2f} | {found.copied_bytes / 1e9:.2f} | "
            f"{found.moved_bytes / 1e9:.1f} | {found.migrating_checks():.2%} | {found.migrating_checks(1000):.2%} | "
            f"{found.step_seconds * 1e3:.2f} |",
            flush=True,
        )


HEADER = """| trace | ep | copies a rank | policy | max/mean | from 1,000 on | copies a pass | GB copied a step | GB moved in all | checks that move | from 1,000 on | ms a step |
|---|--:|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|"""  # noqa: E501


def run_replay(arguments: argparse.Namespace) -> None:
    trace = read_trace(arguments.trace)
    trace = RoutingTrace(
        trace.iterations_N, trace.counts_NLSE[:, 1 % arguments.every_layer :: arguments.every_layer], "real"
    )
    print(HEADER)
    for parts in arguments.ep:
        for slots in arguments.copies:
            table(trace, costs_of(arguments.hardware, parts), parts, slots)


def run_workloads(arguments: argparse.Namespace) -> None:
    print(HEADER)
    for workload in arguments.names or WORKLOADS:
        long = workload == "training"
        trace = generate(workload, records=101 if long else 20, every=50 if long else 10)
        for parts in arguments.ep:
            for slots in arguments.copies:
                table(trace, costs_of(arguments.hardware, parts), parts, slots)


def run_planner(arguments: argparse.Namespace) -> None:
    print("CPU time of one thread; 64 layers one after the other\n")
    print(
        "| experts | ranks | ranks a node | fast, ms a layer (median, most) | slow, ms a layer (median, most) | 64 layers, s |"
    )
    print("|--:|--:|--:|--:|--:|--:|")
    for experts, parts in ((32, 8), (64, 16), (128, 32), (256, 64)):
        trace = generate(
            "training", records=5, every=500, layers=arguments.layers, experts=experts, sources=1, tokens=parts * 8192
        )
        load_NLE = trace.counts_NLSE.sum(2)
        owner_E = np.repeat(np.arange(parts), experts // parts)
        for per_node in sorted({8, parts}):
            costs = replace(costs_of(arguments.hardware, parts), parts_per_node=per_node)
            fast = [_seconds(partial(plan_copies, rows, owner_E, parts, costs, 1)) for rows in load_NLE[-1]]
            homes = Placement.contiguous(experts, parts)
            slow = [
                _seconds(partial(relocated, load_NLE[1:, layer], homes, costs, 1), 1)
                for layer in range(min(4, arguments.layers))
            ]
            print(
                f"| {experts} | {parts} | {per_node} | {np.median(fast) * 1e3:.2f}, {max(fast) * 1e3:.2f} | "
                f"{np.median(slow) * 1e3:.0f}, {max(slow) * 1e3:.0f} | {64 * np.median(slow):.1f} |",
                flush=True,
            )


def run_idle(arguments: argparse.Namespace) -> None:
    """Counts what is spent where there is nothing to gain: the plan of each pass, the check, and the bytes of its sum."""
    print(
        "routing of the workload 'balanced', 8,192 tokens a rank; at rest a check every 256 steps (one thread's CPU time)\n"
    )
    print(
        "| experts | ranks | plan of a pass, ms | pass of a layer, ms | share | check of a layer, ms | a step | "
        "share of a step | sum of a check, bytes a step | share of the rows' bytes |"
    )
    print("|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    for experts, parts in ((32, 8), (64, 16), (128, 32), (256, 64)):
        trace = generate("balanced", records=9, layers=1, experts=experts, sources=1, tokens=parts * 8192)
        load_NE = trace.counts_NLSE.sum(2)[:, 0]
        homes, costs = Placement.contiguous(experts, parts), costs_of(arguments.hardware, parts)
        owner_E, copies = np.repeat(np.arange(parts), experts // parts), ExpertCopies("joint", costs=costs)
        counts_SE = np.zeros((parts, experts), dtype=np.int64)
        counts_SE[0] = load_NE[-1]
        assert copies.plan(counts_SE, parts).copies == 0, "there is something to gain"
        passed = pass_time(at_home(load_NE[-1], owner_E, parts), owner_E, costs).total / 1e12
        plan = _seconds(partial(copies.plan, counts_SE, parts))
        loop = SlowLoop("joint", interval=1)
        loop.expect_copies(2)
        for step, rows_E in enumerate(load_NE):
            decision = loop.decide(step, {"layer": rows_E}, {"layer": homes}, costs, 1000)
            assert not decision.placements, "there is something to gain"
        check = _seconds(partial(loop.decide, 9, {"layer": load_NE[-1]}, {"layer": homes}, costs, 1000))
        summed = 8 * (experts + 1 + parts) / LAST
        rows = 4 * 2 * HIDDEN * load_NE[-1].sum() / parts  # there and back, forward and backward, 16 bits
        print(
            f"| {experts} | {parts} | {plan * 1e3:.3f} | {passed * 1e3:.2f} | {plan / passed:.2%} | {check * 1e3:.2f} | "
            f"{check / LAST * 1e6:.1f} us | {check / LAST / passed:.3%} | {summed:.1f} | {summed / rows:.1e} |",
            flush=True,
        )


def _seconds(call: Callable[[], Any], rounds: int = 5) -> float:
    times = []
    for _ in range(rounds):
        started = time.process_time()
        call()
        times.append(time.process_time() - started)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    for name, run in (
        ("replay", run_replay),
        ("workloads", run_workloads),
        ("planner", run_planner),
        ("idle", run_idle),
    ):
        part = parts.add_parser(name)
        part.set_defaults(run=run)
        part.add_argument("--hardware", default="dgx-h100")
        if name == "replay":
            part.add_argument("trace")
            part.add_argument(
                "--every-layer", type=int, default=1, metavar="N", help="every Nth layer only, from the second on"
            )
        if name == "workloads":
            part.add_argument("names", nargs="*", help="some of the workloads; all by default")
        if name == "planner":
            part.add_argument("--layers", type=int, default=16)
        if name in ("replay", "workloads"):
            part.add_argument("--ep", type=int, nargs="+", default=[4, 8, 16] if name == "replay" else [8])
            part.add_argument("--copies", type=int, nargs="+", default=[0, 1, 2, 4, 8] if name == "replay" else [0, 1])
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()

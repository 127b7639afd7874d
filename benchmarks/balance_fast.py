# SPDX-License-Identifier: Apache-2.0
"""A MoE layer on two gloo ranks under skewed routing: experts at home against copies of busy experts for one pass.

    python benchmarks/balance_fast.py [--experts 8] [--tokens 2048] [--shares 0.125 0.7 0.95] ...

One step is forward, backward and the sum of the router's gradient; top-1, gated experts in float32, one thread each. A share
of the tokens goes to expert 0, the others anywhere. Both contenders have the same weights and tokens and take turns in the
same two processes; their outputs are compared. A step's time is that of the slower rank; the CPU time is that of the rank
that had most, which says more on a busy machine. Experts' part of a step is the time in their kernels on that rank. Memory
is the largest rank's peak above what it had before the step, in processes whose allocator returns what is freed.

Then the time on the host to plan one pass of 256 experts on 64 ranks, and to find what travels where.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from measuring import RETURN_MEMORY, Clock, counted_traffic, leave, machine, peak_above, run_worker
from torch import Tensor

from lightning_moefold import Fold
from lightning_moefold.balance.copies import CopyPlan
from lightning_moefold.balance.fast import ExpertCopies
from lightning_moefold.dispatch import DispatchConfig
from lightning_moefold.dispatch.copied import travel_of
from lightning_moefold.mesh import FoldedMesh
from lightning_moefold.modules import MoELayer
from lightning_moefold.modules.experts import kernels
from lightning_moefold.parallel import Settings, Sharding, parallelize

RANKS = 2
CONTENDERS = {"at home": None, "copies": ExpertCopies("greedy", 1)}


def layers(args: argparse.Namespace, mesh: FoldedMesh) -> dict[str, MoELayer]:
    """The contenders."""
    torch.manual_seed(0)
    layer = MoELayer(args.hidden, args.experts, 1, args.ffn)
    with torch.no_grad():
        layer.gate.weight.normal_(std=args.hidden**-0.5)
        layer.gate.weight[:, -1] = 0.0
        layer.gate.weight[0, -1] = 30.0
    found = {}
    for name, copies in CONTENDERS.items():
        found[name] = copy.deepcopy(layer)
        found[name].dispatch = DispatchConfig(copies=copies)
        parallelize(found[name], mesh, Settings(Sharding("none")), torch.device("cpu"))
    return found


def tokens(args: argparse.Namespace, rank: int, share: float) -> Tensor:
    """Of which ``share`` ask for expert 0 and the others for another."""
    x = torch.randn(1, args.tokens, args.hidden, generator=torch.Generator().manual_seed(rank + 1))
    x[..., -1] = torch.where(torch.arange(args.tokens) < share * args.tokens, 1.0, -1.0)
    return x.requires_grad_()


def step(layer: MoELayer, x: Tensor) -> Tensor:
    y = layer(x)
    y.backward(torch.ones_like(y))
    dist.all_reduce(layer.gate.weight.grad)
    return y.detach()


@contextmanager
def timed_experts(seconds: list[float]) -> Iterator[None]:
    """Adds up the time in the kernels of the experts."""

    def timed(real: Any) -> Any:
        def call(*args: Any) -> Any:
            start = time.perf_counter()
            found = real(*args)
            seconds[0] += time.perf_counter() - start
            return found

        return staticmethod(call)

    kernel = kernels._ExpertByExpert
    with (
        mock.patch.object(kernel, "forward", timed(kernel.forward)),
        mock.patch.object(kernel, "backward", timed(kernel.backward)),
    ):
        yield


def largest(values: list[float]) -> list[float]:
    """Over ranks."""
    found = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()


def work(args: argparse.Namespace) -> None:
    """Both ranks run this; rank zero prints the figures."""
    dist.init_process_group("gloo")
    mesh = FoldedMesh(Fold(RANKS, expert_parallel_size=RANKS), "cpu")
    leave([compare(args, mesh, share) for share in args.shares])


def compare(args: argparse.Namespace, mesh: FoldedMesh, share: float) -> dict[str, Any]:
    """Both contenders under one routing, in turns."""
    group, x = layers(args, mesh), tokens(args, mesh.rank, share)
    found: dict[str, Any] = {}
    outputs = {}

    def clear(layer: MoELayer) -> None:
        layer.zero_grad()
        x.grad = None

    for name, layer in group.items():
        with counted_traffic() as counter:
            outputs[name] = step(layer, x)
        clear(layer)
        copies = layer.copies
        found[name] = {"sent": largest([counter.sent])[0], "copies": copies.copies, "rows": copies.rows}
        if copies.mean:
            found["at home"]["load"], found[name]["load"] = (
                copies.busiest_home / copies.mean,
                copies.busiest / copies.mean,
            )
        if args.worker == "memory":
            found[name]["peak"] = largest([peak_above(partial(step, layer, x))])[0]
            clear(layer)
    error = (outputs["copies"] - outputs["at home"]).abs().max() / outputs["at home"].abs().max()
    assert error < 1e-5, f"the outputs differ by {error:.1e}"
    if args.worker == "memory":
        return found
    clocks = {name: Clock() for name in group}
    parts: dict[str, list[float]] = {name: [] for name in group}
    for _ in range(args.rounds):
        for name, layer in group.items():
            seconds = [0.0]
            dist.barrier()
            with timed_experts(seconds):
                clocks[name].measure(partial(step, layer, x))
            parts[name].append(seconds[0] / clocks[name].wall[-1])
            clear(layer)
    for name, clock in clocks.items():
        found[name] |= {"wall": largest(clock.wall), "cpu": largest(clock.cpu), "experts": largest(parts[name])}
    return found


def planning(experts: int = 256, ranks: int = 64, rounds: int = 9) -> tuple[int, float, float]:
    """Copies, and milliseconds of the policy and of what every rank works out of its plan."""
    counts_SE = np.random.default_rng(0).integers(0, 64, (ranks, experts))
    counts_SE[:, :3] += 700
    options, seconds = ExpertCopies("greedy", 1), []
    for _ in range(rounds):
        start = time.perf_counter()
        plan = options.plan(counts_SE, ranks)
        middle = time.perf_counter()
        travel_of(counts_SE, CopyPlan(plan.quota_RE), [experts // ranks], 7, 0)
        seconds.append((middle - start, time.perf_counter() - middle))
    policy, travel = (1e3 * min(column) for column in zip(*seconds, strict=True))
    return plan.copies, policy, travel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("tokens", 2048),
        ("hidden", 256),
        ("ffn", 512),
        ("experts", 8),
        ("rounds", 7),
        ("threads", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.125, 0.7, 0.95])
    parser.add_argument("--worker", choices=("time", "memory"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    print(f"{args.tokens} tokens per rank, hidden {args.hidden}, ffn {args.ffn}, {args.experts} experts top-1, float32, {RANKS} "
          f"gloo ranks of {args.threads} thread(s), median of {args.rounds} steps")  # fmt: skip
    print(f"{machine()}\n")
    print("| tokens on one expert | experts | rank rows max / mean | copies | step ms | ratio | busiest CPU ms | ratio "
          "| experts' part | MB sent/rank | peak MB/rank |")  # fmt: skip
    print("|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    command = ["--shares", *map(str, args.shares)]
    for name in ("tokens", "hidden", "ffn", "experts", "rounds"):
        command += [f"--{name}", str(getattr(args, name))]
    timed, memory = (
        run_worker("balance_fast.py", [*command, "--worker", kind], ranks=RANKS, threads=args.threads, extra=extra)
        for kind, extra in (("time", {}), ("memory", RETURN_MEMORY))
    )
    for share, group, peaks in zip(args.shares, timed, memory, strict=True):
        base = group["at home"]
        for name, row in group.items():
            wall, cpu, part = (statistics.median(row[key]) for key in ("wall", "cpu", "experts"))
            faster = [
                statistics.median(b / a for a, b in zip(row[key], base[key], strict=True)) for key in ("wall", "cpu")
            ]
            print(f"| {share:.1%} | {name} | {row['load']:.2f} | {row['copies']} | {wall * 1e3:.0f} | {faster[0]:.2f} "
                  f"| {cpu * 1e3:.0f} | {faster[1]:.2f} | {part:.0%} | {row['sent'] / 1e6:.1f} "
                  f"| {peaks[name]['peak'] / 1e6:.0f} |")  # fmt: skip
    copies, policy, travel = planning()
    print(
        f"\n256 experts on 64 ranks, {copies} copies: policy {policy:.2f} ms, rows to send and receive {travel:.2f} ms"
    )


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""How much of the exchange of tokens hides behind the experts' computation: a trace, and shares, forward and backward.

    python benchmarks/overlap.py [--chunks 4] [--trace overlap.json] [--picture overlap.png]
        [--tokens 2048] [--hidden 512] [--ffn 1024] ...

A MoE layer on two gloo ranks runs forward and backward with its exchange in one part and in chunks. Noted are, on each
rank, when every collective of a :class:`~lightning_moefold.async_comm.Handle` is under way (from its start until gloo reports it
done), when the rank waits for one, and when experts compute. "hidden" is the share of the time in which some exchange is
under way in which the rank does not wait for one; "behind experts" that in which experts compute. The trace is in Chrome's
format: open it at ``chrome://tracing`` or https://ui.perfetto.dev.

An exchange that is under way has not always begun to move: it may wait for the peer, whose experts may have more rows; and
here gloo's copies and the ranks' computation share the machine's cores, so that what hides still costs time.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from measuring import machine
from torch import Tensor

from lightning_moefold import Fold
from lightning_moefold.async_comm import Handle
from lightning_moefold.dispatch import DispatchConfig
from lightning_moefold.mesh import FoldedMesh
from lightning_moefold.modules import Experts, MoELayer
from lightning_moefold.modules.experts import kernels
from lightning_moefold.parallel import Settings, Sharding, parallelize
from lightning_moefold.plots.style import COLORS, make_figure, save_figure
from lightning_moefold.testing import RankPool

EXCHANGE, WAIT, EXPERTS = "exchange", "wait", "experts"
Interval = tuple[float, float]


@dataclass
class Recorder:
    """Intervals of each kind, in seconds of the machine's clock."""

    intervals: dict[str, list[Interval]] = field(default_factory=lambda: {EXCHANGE: [], WAIT: [], EXPERTS: []})
    under_way: list[threading.Event] = field(default_factory=list)

    @contextmanager
    def during(self, kind: str) -> Iterator[None]:
        """Notes the time inside."""
        start = time.monotonic()
        yield
        self.intervals[kind].append((start, time.monotonic()))

    def follow(self, work: dist.Work) -> None:
        """Notes when a collective that just started is done."""
        start, done = time.monotonic(), threading.Event()
        self.under_way.append(done)

        def note(_: Any) -> None:
            self.intervals[EXCHANGE].append((start, time.monotonic()))
            done.set()

        work.get_future().add_done_callback(note)

    def settle(self) -> None:
        """Waits for the callbacks."""
        for done in self.under_way:
            assert done.wait(30), "a collective never ended"
        self.under_way.clear()


@contextmanager
def recorded() -> Iterator[Recorder]:
    """Follows flights and experts of this rank."""
    recorder = Recorder()
    start, wait, compute = Handle.start, Handle.wait, Experts.compute
    backward = kernels._ExpertByExpert.backward

    def started(flight: Handle, *args: Any, **kwargs: Any) -> list[Tensor | None]:
        outs = start(flight, *args, **kwargs)
        for _, work, _, _ in flight._pending:
            recorder.follow(work)
        return outs

    def waited(flight: Handle) -> list[Tensor]:
        with recorder.during(WAIT):
            return wait(flight)

    def computed(experts: Experts, *args: Any) -> Tensor:
        with recorder.during(EXPERTS):
            return compute(experts, *args)

    def went_back(ctx: Any, *grads: Tensor) -> Any:
        with recorder.during(EXPERTS):
            return backward(ctx, *grads)

    with ExitStack() as stack:
        for target, name, replacement in (
            (Handle, "start", started),
            (Handle, "wait", waited),
            (Experts, "compute", computed),
            (kernels._ExpertByExpert, "backward", staticmethod(went_back)),
        ):
            stack.enter_context(mock.patch.object(target, name, replacement))
        yield recorder


def union(intervals: list[Interval]) -> list[Interval]:
    """Disjoint intervals that cover the same."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def length(intervals: list[Interval]) -> float:
    """Seconds covered."""
    return sum(end - start for start, end in union(intervals))


def overlap(some: list[Interval], others: list[Interval]) -> float:
    """Seconds covered by both."""
    return sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in union(some) for b in union(others))


def job(chunks: int, experts: int, top_k: int, tokens: int, hidden: int, ffn: int, rounds: int) -> list[dict[str, Any]]:
    """Intervals of every round, forward and backward apart."""
    world = dist.get_world_size()
    mesh = FoldedMesh(Fold(world, expert_parallel_size=world), "cpu")
    torch.manual_seed(0)
    layer = MoELayer(hidden, experts, top_k, ffn, dispatch=DispatchConfig(chunks=chunks))
    parallelize(layer, mesh, Settings(Sharding("none")), torch.device("cpu"))
    generator = torch.Generator().manual_seed(mesh.rank + 1)
    x, grad = torch.randn(2, 1, tokens, hidden, generator=generator).unbind(0)
    x.requires_grad_()
    layer(x).backward(grad)
    found = []
    for _ in range(rounds):
        layer.zero_grad()
        output, round_ = None, {}
        for phase in ("forward", "backward"):
            dist.barrier()
            with recorded() as recorder:
                start = time.monotonic()
                if output is None:
                    output = layer(x)
                else:
                    output.backward(grad)
                whole = (start, time.monotonic())
                recorder.settle()
            round_[phase] = {**recorder.intervals, "whole": [whole]}
        found.append(round_)
    return found


def shares(rounds: list[dict[str, Any]], phase: str) -> dict[str, float]:
    """Medians over rounds of one rank."""
    figures: dict[str, list[float]] = {"whole": [], "exchange": [], "waited": [], "hidden": [], "behind": []}
    for round_ in rounds:
        found = round_[phase]
        exchange = length(found[EXCHANGE])
        figures["whole"].append(length(found["whole"]))
        figures["exchange"].append(exchange)
        figures["waited"].append(length(found[WAIT]))
        figures["hidden"].append(1 - overlap(found[EXCHANGE], found[WAIT]) / exchange)
        figures["behind"].append(overlap(found[EXCHANGE], found[EXPERTS]) / exchange)
    return {key: statistics.median(values) for key, values in figures.items()}


def chrome_trace(ranks: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """The last round of every rank; collectives that are under way together get lines of their own."""
    events: list[dict[str, Any]] = []
    first = min(round_[-1]["forward"]["whole"][0][0] for round_ in ranks)
    for rank, rounds in enumerate(ranks):
        events.append({"ph": "M", "pid": rank, "name": "process_name", "args": {"name": f"rank {rank}"}})
        for phase in ("forward", "backward"):
            for kind, intervals in rounds[-1][phase].items():
                ends: list[float] = []  # of each line
                for start, end in sorted(intervals):
                    line = next((i for i, e in enumerate(ends) if e <= start), len(ends))
                    ends[line : line + 1] = [end]
                    name = phase if kind == "whole" else kind
                    events.append({"ph": "X", "pid": rank, "tid": f"{'layer' if kind == 'whole' else kind} {line}", "name": name,
                                   "ts": (start - first) * 1e6, "dur": (end - start) * 1e6})  # fmt: skip
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def draw(ranks: list[list[dict[str, Any]]], path: Path) -> None:
    """The same as a picture: a lane for each kind on each rank, time from left to right."""
    rounds = [round_[-1] for round_ in ranks]
    first = min(round_["forward"]["whole"][0][0] for round_ in rounds)
    lanes = [(rank, kind) for rank in range(len(rounds)) for kind in (EXPERTS, EXCHANGE, WAIT)]
    colors = dict(zip((EXPERTS, EXCHANGE, WAIT), (COLORS[0], COLORS[4], COLORS[1]), strict=True))
    figure, [axes] = make_figure("Tokens travel while experts compute", [0.45 * len(lanes) + 0.9])
    axes.grid(visible=False)
    for lane, (rank, kind) in enumerate(lanes):
        for phase in ("forward", "backward"):
            bars = [((start - first) * 1e3, (end - start) * 1e3) for start, end in rounds[rank][phase][kind]]
            axes.broken_barh(bars, (lane - 0.4, 0.8), facecolors=colors[kind], edgecolor="white", linewidth=0.5)
    for phase in ("forward", "backward"):
        start, end = ((t - first) * 1e3 for t in rounds[0][phase]["whole"][0])
        axes.axvspan(start, end, color="0.95", zorder=0)
        axes.text((start + end) / 2, -0.75, phase, ha="center")
    axes.set_yticks(range(len(lanes)), [f"rank {rank}: {kind}" for rank, kind in lanes])
    axes.set_ylim(len(lanes) - 0.4, -1.2)
    axes.set_xlim(0, max(round_["backward"]["whole"][0][1] - first for round_ in rounds) * 1e3)
    axes.set_xlabel("ms")
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("chunks", 4), ("experts", 16), ("top-k", 2), ("tokens", 2048), ("hidden", 512), ("ffn", 1024),
                          ("rounds", 7)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--trace", type=Path, default=Path("overlap.json"))
    parser.add_argument("--picture", type=Path, metavar="FILE.png")
    args = parser.parse_args()
    sizes = (args.experts, args.top_k, args.tokens, args.hidden, args.ffn, args.rounds)
    print(f"{args.tokens} tokens per rank, hidden {args.hidden}, ffn {args.ffn}, {args.experts} experts top-{args.top_k}, "
          f"float32, 2 gloo ranks of one thread, median of {args.rounds} rounds, rank 0")  # fmt: skip
    print(f"{machine()}\n")
    print(
        "| chunks | phase | ms | exchange under way, ms | waited, ms | hidden | behind experts |\n|--:|---|--:|--:|--:|--:|--:|"
    )
    with RankPool(2) as pool:
        for chunks in (1, args.chunks):
            ranks = pool.run(job, chunks, *sizes, ranks=2, timeout=300)
            for phase in ("forward", "backward"):
                s = shares(ranks[0], phase)
                print(f"| {chunks} | {phase} | {s['whole'] * 1e3:.0f} | {s['exchange'] * 1e3:.0f} | {s['waited'] * 1e3:.0f} | "
                      f"{s['hidden']:.0%} | {s['behind']:.0%} |", flush=True)  # fmt: skip
    args.trace.write_text(json.dumps(chrome_trace(ranks)))
    if args.picture:
        draw(ranks, args.picture)
    print(f"\ntrace of the last round with {args.chunks} chunks: {args.trace}")


if __name__ == "__main__":
    importlib.import_module("overlap").main()  # the ranks can import what is in a module

# SPDX-License-Identifier: Apache-2.0
"""Time and memory of calls on a device: events, medians, contenders that take turns."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from gpu_parts.record import Context, one_line, synchronize

#: Calls ``mark()`` between forward and backward, or never.
Call = Callable[[Callable[[], None]], Any]


@dataclass
class Contender:
    """One of several that take turns.

    Args:
        name: First column.
        call: What is timed.
        after: Runs after each call, outside of the time: drops gradients.
        cells: Cells of its row, from the milliseconds of a call.
        limit: Seconds for its first calls, in which it may compile.
    """

    name: str
    call: Call
    after: Callable[[], None] = lambda: None
    cells: Callable[[float], dict[str, Any]] = lambda _: {}
    limit: float = 60
    peak_gb: float | None = None
    whole: list[float] = field(default_factory=list)
    forward: list[float] = field(default_factory=list)


class Watch:
    """Stamps on the current stream, or on the host's clock where there is no GPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._stamps: list[Any] = []

    def stamp(self) -> None:
        """Now."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._stamps.append(event)
        else:
            self._stamps.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """From the first stamp to each of the others."""
        first, *rest = self._stamps
        if self._cuda:
            rest[-1].synchronize()
            return [first.elapsed_time(event) for event in rest]
        return [(stamp - first) * 1e3 for stamp in rest]


def take_turns(
    ctx: Context, table: str, contenders: list[Contender], *, versus: str = "", rounds: int = 10, warmup: int = 3, **labels: Any
) -> None:  # fmt: skip
    """Times contenders call by call in turn and adds a row for each; one that fails leaves the others alone.

    Peak memory is that of a call above what there was before it, gradients included.

    Args:
        ctx: Where.
        table: Title.
        contenders: Who.
        versus: One of them, for a column of how much faster the others are.
        rounds: Calls of each.
        warmup: Calls of each before these.
        **labels: Cells in front.
    """
    record = ctx.record
    rounds, warmup = ctx.pick((rounds, warmup), (2, 1))
    keys = {c.name: " / ".join([table, *map(str, labels.values()), c.name]) for c in contenders}
    alive = []
    for one in contenders:
        if not record.is_new(keys[one.name]) or not record.begin_try(keys[one.name], one.limit):
            continue
        try:
            for number in range(warmup):
                if number == warmup - 1:
                    before = _reset_peak(ctx)
                one.call(lambda: None)
                if number == warmup - 1:
                    one.peak_gb = _peak_above(ctx, before)
                one.after()
            synchronize()
            alive.append(one)
        except Exception as error:
            _drop(ctx, table, one, keys[one.name], error, labels)
    base = {one.name: one for one in alive}.get(versus)
    for _ in range(rounds):
        for one in list(alive):
            if record.time_left < 2 and len(one.whole) >= 3:
                continue  # three will do for a median
            record.begin_try(keys[one.name], 30, even_late=True)
            try:
                watch = Watch(ctx.device)
                watch.stamp()
                one.call(watch.stamp)
                watch.stamp()
                *forward, whole = watch.milliseconds()
                one.forward += forward[:1]
                one.whole.append(whole)
                one.after()
            except Exception as error:
                alive.remove(one)
                _drop(ctx, table, one, keys[one.name], error, labels)
    for one in alive:
        median = statistics.median(one.whole)
        pairs = zip(base.whole, one.whole, strict=False) if base in alive and base is not None else ()
        ratio = statistics.median(b / a for b, a in pairs) if pairs else None
        cells = {
            "ms": median,
            f"speed / {versus}": ratio,
            "forward_ms": statistics.median(one.forward) if one.forward else None,
            "spread": (max(one.whole) - min(one.whole)) / median if median else None,
            "peak_gb": one.peak_gb,
        }
        record.row(table, **labels, what=one.name, **cells, **one.cells(median))
        record.end_try(keys[one.name])


def _drop(ctx: Context, table: str, one: Contender, key: str, error: Exception, labels: dict[str, Any]) -> None:
    """A contender is out of it; its gradients go."""
    try:
        one.after()
    except Exception as later:
        print(f"after {key}: {later!r}")
    ctx.record.row(table, **labels, what=one.name, note=one_line(error))
    ctx.record.fail_try(key, error)


def _reset_peak(ctx: Context) -> int:
    if not ctx.on_gpu:
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _peak_above(ctx: Context, before: int) -> float | None:
    if not ctx.on_gpu:
        return None
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def median_ms(ctx: Context, call: Callable[[], Any], rounds: int = 10, warmup: int = 3) -> float:
    """Median milliseconds of one call, alone."""
    rounds, warmup = ctx.pick((rounds, warmup), (2, 1))
    for _ in range(warmup):
        call()
    found = []
    for _ in range(rounds):
        watch = Watch(ctx.device)
        watch.stamp()
        call()
        watch.stamp()
        found += watch.milliseconds()
    return statistics.median(found)


def peak_flops(device: torch.device) -> float:
    """Dense bfloat16 peak of the device in FLOP/s; that of an H100 where it is not known."""
    from lightning_moefold.callbacks.peaks import cuda_peak_flops

    known = cuda_peak_flops(device, "bf16-true") if device.type == "cuda" else None
    return known or 989e12


def kernels_of(ctx: Context, call: Callable[[], Any]) -> list[dict[str, Any]]:
    """Kernels of a call, by time, longest first: name, milliseconds, count. On CPU, operators."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if ctx.on_gpu else [])
    call()
    synchronize()
    with profile(activities=activities) as found:
        call()
        synchronize()
    rows = []
    for event in found.key_averages():
        on_device = str(getattr(event, "device_type", "")).endswith("CUDA")
        if ctx.on_gpu and (not on_device or getattr(event, "is_user_annotation", False)):
            continue
        spent = getattr(event, "self_device_time_total", 0.0) if ctx.on_gpu else event.self_cpu_time_total
        if spent:
            rows.append({"kernel": event.key, "ms": spent / 1e3, "count": event.count})
    return sorted(rows, key=lambda row: -row["ms"])


def host_waits(ctx: Context, call: Callable[[], Any]) -> list[str]:
    """Where the host waits for the device during a call, one line each."""
    ctx.needs_gpu()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [
        f"{w.filename.rsplit('site-packages/', 1)[-1]}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)
    ]

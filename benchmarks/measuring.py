# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks of layers share: clocks, medians, peak memory, what travels between ranks, and how a table is headed."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from lightning_moefold.modules.experts import cpu_cache

HERE = Path(__file__).parent


def machine() -> str:
    """Versions and machine, and how busy it is: wall-clock figures of a busy machine say little."""
    return (
        f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores, {platform.machine()}, "
        f"load average {os.getloadavg()[0]:.1f} at the start"
    )


@dataclass
class Clock:
    """Wall-clock and CPU seconds of calls of one contender.

    Args:
        wall: Seconds that passed.
        cpu: Seconds of all threads of this process; those that wait in a loop count too.
    """

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def measure(self, call: Callable[[], Any]) -> None:
        """Calls once."""
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)

    def medians(self) -> dict[str, float]:
        """Both medians."""
        return {"wall": statistics.median(self.wall), "cpu": statistics.median(self.cpu)}


def median_ratio(values: list[float], base: list[float]) -> float:
    """Median over rounds of ``value / base``: both were taken in the same seconds, and a busy machine hits both."""
    return statistics.median(v / b for v, b in zip(values, base, strict=True))


def resident_peak() -> int:
    """Bytes, since :func:`reset_peak`."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


def peak_above(call: Callable[[], Any]) -> int:
    """Bytes of resident memory at the peak of a call above those before it."""
    gc.collect()
    cpu_cache.release()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_peak()
    call()
    return resident_peak() - before


#: With these, the allocator returns every large block at once; otherwise it keeps what was freed, and peaks add up.
#: It also makes every call slower, so memory is measured in processes of its own.
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def run_worker(
    script: str, arguments: list[str], *, ranks: int = 1, threads: int | None = None, extra: Mapping[str, str] | None = None
) -> Any:  # fmt: skip
    """Runs ``script arguments`` on new processes and returns what rank zero printed behind RESULT.

    Args:
        script: A file beside this one.
        arguments: Its command line.
        ranks: How many processes.
        threads: Of each; all cores, shared evenly, by default.
        extra: Environment variables.
    """
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    threads = threads or max(1, (os.cpu_count() or 1) // ranks)
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **(extra or {}), "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}
    done = subprocess.run([*command, str(HERE / script), *arguments], capture_output=True, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    if done.returncode or not lines:
        raise SystemExit(f"{script} {' '.join(arguments)} on {ranks} ranks failed:\n{done.stderr[-3000:]}")
    return json.loads(lines[-1].removeprefix("RESULT"))


def leave(result: Any = None) -> None:
    """Prints a result on rank zero and ends the process, which may abort if it ends with open groups."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print("RESULT", json.dumps(result))
    if dist.is_initialized():
        dist.barrier()
    sys.stdout.flush()
    os._exit(0)


# ---- what travels ----------------------------------------------------------------------------------------------------


@dataclass
class Traffic:
    """Collectives that this rank has called, and the bytes that they send from it to other ranks.

    An all-to-all sends what is for others; an all-gather its input to each of the G - 1 others; a reduce-scatter to each of
    them their part; an all-reduce is a reduce-scatter and an all-gather, ``2 (G - 1) / G`` of the tensor.

    Args:
        calls: How many collectives of each kind.
        sent: Bytes.
    """

    calls: dict[str, int] = field(default_factory=dict)
    sent: float = 0.0

    def note(self, kind: str, sent: float) -> None:
        """One collective."""
        self.calls[kind] = self.calls.get(kind, 0) + 1
        self.sent += sent

    @property
    def count(self) -> int:
        """Collectives of all kinds."""
        return sum(self.calls.values())


@contextmanager
def counted_traffic() -> Iterator[Traffic]:
    """Counts the collectives that are called through ``torch.distributed``."""
    traffic = Traffic()

    def wrap(name: str, sent: Callable[..., float]) -> Any:
        real = getattr(dist, name)

        def called(*args: Any, **kwargs: Any) -> Any:
            traffic.note(name, sent(*args, **kwargs))
            return real(*args, **kwargs)

        return mock.patch.object(dist, name, called)

    def size(x: torch.Tensor) -> int:
        return x.numel() * x.element_size()

    def ranks(kwargs: dict[str, Any]) -> int:
        return dist.get_world_size(kwargs.get("group"))

    def all_to_all(output: Any, input: Any, receive: Any = None, send: Any = None, **kwargs: Any) -> float:
        group = kwargs.get("group")
        receive, send = kwargs.get("output_split_sizes", receive), kwargs.get("input_split_sizes", send)
        if not send:
            return size(input) * (1 - 1 / ranks(kwargs))
        rows = sum(send) - send[dist.get_rank(group)]
        return rows * size(input[:1])

    def all_gather(output: Any, input: Any, **kwargs: Any) -> float:
        return size(input) * (ranks(kwargs) - 1)

    def reduce_scatter(output: Any, input: Any, *args: Any, **kwargs: Any) -> float:
        return size(input) * (1 - 1 / ranks(kwargs))

    def all_reduce(tensor: Any, *args: Any, **kwargs: Any) -> float:
        return 2 * size(tensor) * (1 - 1 / ranks(kwargs))

    gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    scatter = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
    with (
        wrap("all_to_all_single", all_to_all),
        wrap(gather, all_gather),
        wrap(scatter, reduce_scatter),
        wrap("all_reduce", all_reduce),
    ):
        yield traffic

# SPDX-License-Identifier: Apache-2.0
"""Measures this machine and writes the planner's hardware file.

All ranks measure at the same time, each on its own device (or its share of the cores), because they will also train at
the same time. Each constant comes from the measurement that determines it best:

- ``gemm_efficiency``, ``gemm_half_size``: a fit of a list of matrix products with the least error in log time;
- attention: long and short sequences, forward and backward;
- ``memory_bandwidth``: a large copy; ``launch``: a tiny operation;
- links: all-gather, all-to-all and reduce-scatter by size; the smallest message is the latency, the largest the bandwidth.
"""

from __future__ import annotations

import math
import os
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.nn import functional as F

from lightning_moefold import comm
from lightning_moefold.errors import InputError
from lightning_moefold.mesh import Axis
from lightning_moefold.planner.machine.hardware import GIB, Hardware, Kernels, Link

#: Sides of the measured products: cubes, and flat ones as in experts.
_PRODUCTS = [
    (64, 64, 64),
    (128, 128, 128),
    (256, 256, 256),
    (512, 512, 512),
    (32, 512, 512),
    (128, 512, 256),
    (256, 128, 512),
]
#: Factor by which the sides of products and copies are larger on a GPU.
_SCALE_ON_GPU = 8
#: Relative error of the fit above which other programs are assumed to have disturbed the measurement.
DISTURBED = 0.3


@dataclass(frozen=True)
class Sizes:
    """Sizes at which attention and links are measured: as large as in real models, since small ones do not fill a device.

    Args:
        lengths: Number of tokens of the short and the long row.
        heads: Number of attention heads.
        head_size: Size of each head.
        messages: Sizes of messages in bytes.
    """

    lengths: tuple[int, int]
    heads: int
    head_size: int
    messages: tuple[int, ...]


ON_CPU = Sizes((64, 256), 8, 64, (2**12, 2**16, 2**20, 2**23))
#: NVLink reaches its rate from some 100 MB on, and a fused kernel needs blocks of rows from several dozen heads to fill
#: a GPU.
ON_GPU = Sizes((1024, 8192), 32, 128, (2**12, 2**16, 2**20, 2**23, 2**26, 2**28, 2**30))

#: A measured product: sides m, n, k, and seconds.
Product = tuple[int, int, int, float]


@dataclass(frozen=True)
class Measurements:
    """Measurements of one rank, in seconds, bytes and bytes/s.

    Args:
        products: Measured matrix products.
        attention: For each row, its length, forward FLOP/s and backward FLOP/s.
        copy: Bytes/s read and written by a large copy.
        launch: Seconds of a tiny operation.
        gather: For each all-gather, bytes of the gathered tensor and seconds.
        exchange: For each all-to-all, bytes sent by a rank and seconds.
        reduce: For each reduce-scatter, bytes of its input and seconds.
    """

    products: list[Product]
    attention: list[tuple[int, float, float]]
    copy: float
    launch: float
    gather: list[tuple[int, float]]
    exchange: list[tuple[int, float]]
    reduce: list[tuple[int, float]]


# ---- fitting ---------------------------------------------------------------------------------------------------------


def fit_products(products: list[Product]) -> tuple[float, float, float]:
    """Fits the rate of a very large product, the half size, and the typical relative error of the fit.

    For a given half size h, the best rate is the geometric mean of the rates that the products imply, so one search
    over h is enough.
    """
    best = (math.inf, 0.0, 0.0)
    for step in range(120):
        half = 1.09**step - 1
        implied = [math.log(2 * m * n * k * _borders(m, n, k, half) / s) for m, n, k, s in products]
        error = statistics.pstdev(implied)
        if error < best[0]:
            best = (error, math.exp(statistics.fmean(implied)), half)
    error, rate, half = best
    return rate, half, math.expm1(error)


def _borders(m: int, n: int, k: int, half: float) -> float:
    return (1 + half / m) * (1 + half / n) * (1 + half / k)


def fit_link(samples: list[tuple[int, float]], part: float) -> tuple[float, float]:
    """Returns the seconds of an empty message and the bytes/s of a large one, of which the share ``part`` travels."""
    start = min(seconds for _, seconds in samples)
    size, seconds = max(samples)
    return start, part * size / max(seconds - start, 1e-9)


def describe(
    measured: Measurements, ranks: int, dtype: str, memory: float, name: str, cores: int | None = None
) -> Hardware:
    """Turns measurements into a Hardware; ``cores`` is the number of cores that CPU ranks share, None for GPUs."""
    rate, half, _ = fit_products(measured.products)
    shortest, short_forward, _ = min(measured.attention)
    length, forward, backward = max(measured.attention)
    # efficiency(L) = e L / (L + half): two lengths give both.
    ratio = min(short_forward / forward, 0.999)
    attention_half = max((1 - ratio) / (ratio / shortest - 1 / length), 0.0) if ratio / shortest > 1 / length else 0.0
    messages = (measured.gather, measured.exchange, measured.reduce)
    (start, gather_rate), (_, exchange_rate), (_, reduce_rate) = (fit_link(m, (ranks - 1) / ranks) for m in messages)
    link = Link(gather_rate, 0.0, 1.0)
    kernels = Kernels(
        gemm_efficiency=1.0,
        gemm_half_size=half,
        attention_efficiency=forward * (1 + attention_half / length) / rate,
        attention_backward_ratio=backward / forward,
        attention_half_length=attention_half,
        memory_efficiency=1.0,
        launch=measured.launch,
        collective=start,
        alltoall_efficiency=exchange_rate / gather_rate,
        reduce_efficiency=min(reduce_rate / gather_rate, 1.0),
        overlap=0.0 if dtype == "fp32" else Kernels().overlap,
        host_sync=measured.launch,
        waiting=1.0 if cores is None or ranks <= cores else 0.0,
    )
    reserved = 0.1 * memory
    device = "cuda" if cores is None else "cpu"
    return Hardware(name, ranks, {dtype: rate}, memory, measured.copy, link, link, reserved, kernels, device)


# ---- measuring -------------------------------------------------------------------------------------------------------


def seconds_of(action: Callable[[], Any], synchronize: Callable[[], None], count: int | None = None) -> float:
    """Times ``action`` without the effect of other programs.

    Args:
        action: What is timed.
        synchronize: Waits for the device.
        count: Number of repetitions, which must be equal on all ranks for a collective; by default as many as take 0.15
            seconds, from 5 to 200.
    """
    least, most = (5, 200) if count is None else (count, count)
    for _ in range(1 if count is None else 2):
        action()
    synchronize()
    times: list[float] = []
    ends = time.perf_counter() + 0.15
    while len(times) < least or (time.perf_counter() < ends and len(times) < most):
        started = time.perf_counter()
        action()
        synchronize()
        times.append(time.perf_counter() - started)
    return _undisturbed(times)


def _undisturbed(times: list[float]) -> float:
    """Returns the lower decile: the time on an undisturbed machine, without relying on the single best time.

    If ranks share cores, it is the mean, because the best times are those of a rank that had a core to itself.
    """
    if dist.is_initialized() and dist.get_backend() == "gloo" and dist.get_world_size() > (os.cpu_count() or 1):
        return statistics.fmean(times)
    return sorted(times)[len(times) // 10]


def measure(device: torch.device, dtype: torch.dtype) -> Measurements:
    """Measures on this rank; collective over the default process group."""
    on_gpu = device.type == "cuda"
    synchronize = torch.cuda.synchronize if on_gpu else _nothing
    scale = _SCALE_ON_GPU if on_gpu else 1
    make: dict[str, Any] = {"device": device, "dtype": dtype}
    products = []
    for sides in _PRODUCTS:
        m, n, k = (side * scale for side in sides)
        a, b = torch.randn(m, k, **make), torch.randn(k, n, **make)
        products.append((m, n, k, seconds_of(partial(torch.matmul, a, b), synchronize)))
    sizes = ON_GPU if on_gpu else ON_CPU
    attention = [_attention(length, sizes, make, synchronize) for length in sizes.lengths]
    large = torch.empty(2**22 * scale**2, **make)
    target = torch.empty_like(large)
    copy = 2 * large.nbytes / seconds_of(lambda: target.copy_(large), synchronize)
    tiny = torch.zeros(1, **make)
    launch = seconds_of(lambda: tiny.add_(1), _nothing)
    return Measurements(products, attention, copy, launch, *_messages(sizes.messages, device, synchronize))


def _attention(
    length: int, sizes: Sizes, make: dict[str, Any], synchronize: Callable[[], None]
) -> tuple[int, float, float]:
    heads, dim = sizes.heads, sizes.head_size
    q, k, v = (torch.randn(1, heads, length, dim, **make, requires_grad=True) for _ in range(3))

    def forward() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    grad = torch.ones_like(q)

    def both() -> None:
        torch.autograd.grad(forward(), (q, k, v), grad)

    product = 2 * heads * length * (length / 2) * dim
    once = seconds_of(forward, synchronize)
    back = max(seconds_of(both, synchronize) - once, 0.1 * once)
    return length, 2 * product / once, 5 * product / back


def _messages(
    sizes: tuple[int, ...], device: torch.device, synchronize: Callable[[], None]
) -> list[list[tuple[int, float]]]:
    """Times all-gather, all-to-all and reduce-scatter by size, called as by the strategy."""
    ranks = dist.get_world_size()
    world = Axis("world", tuple(range(ranks)), dist.get_rank(), dist.group.WORLD)
    found: list[list[tuple[int, float]]] = [[], [], []]
    for size in sizes:
        mine = torch.zeros(size // 4 // ranks, device=device)
        whole = torch.zeros(mine.numel() * ranks, device=device)
        even = [mine.numel()] * ranks
        actions = (
            partial(comm.all_gather_raw, mine, world), partial(comm.all_to_all, whole, even, even, world),
            partial(comm.reduce_scatter_raw, whole, world),
        )  # fmt: skip
        for samples, action in zip(found, actions, strict=True):
            samples.append((whole.nbytes, seconds_of(action, synchronize, count=15)))
    return found


def _nothing() -> None:
    """Does nothing: on CPU there is no device to wait for."""


def _rank_main(rank: int, ranks: int, folder: str, use_gpu: bool) -> None:
    torch.set_num_threads(max((os.cpu_count() or 1) // ranks, 1))
    device = torch.device("cuda", rank) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if use_gpu else "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks
    )
    try:
        found = measure(device, torch.bfloat16 if use_gpu else torch.float32)
        if rank == 0:
            (Path(folder) / "measured").write_bytes(pickle.dumps(found))
    finally:
        dist.destroy_process_group()


def calibrate(ranks: int, name: str, use_gpu: bool | None = None) -> tuple[Hardware, Measurements]:
    """Measures with ``ranks`` processes on this machine.

    Args:
        ranks: Number of processes; on GPUs one per GPU.
        name: Name of the hardware.
        use_gpu: Whether to measure GPUs; None uses them if there are enough.

    Raises:
        ValueError: If there are fewer than two ranks, or more ranks than GPUs.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    use_gpu = gpus >= ranks if use_gpu is None else use_gpu
    if ranks < 2 or (use_gpu and ranks > gpus):
        raise InputError(
            f"--ranks {ranks} cannot be measured: it takes two or more, and no more than the {gpus} GPUs here."
        )
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank_main, (ranks, folder, use_gpu), nprocs=ranks)
        found: Measurements = pickle.loads((Path(folder) / "measured").read_bytes())
    memory = torch.cuda.get_device_properties(0).total_memory if use_gpu else _host_memory() / ranks
    cores = None if use_gpu else os.cpu_count()
    return describe(found, ranks, "bf16" if use_gpu else "fp32", memory, name, cores), found


def _host_memory() -> float:
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (ValueError, OSError):
        return 8.0 * GIB

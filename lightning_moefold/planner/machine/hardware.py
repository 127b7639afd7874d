# SPDX-License-Identifier: Apache-2.0
"""Hardware: a machine described by a few constants, with their sources. Pure Python.

The presets hold datasheet values (peak, memory, bandwidths). The efficiencies below say which share of them a kernel or
a collective *reaches*. They are shared by all presets of a kind; replace them by measured ones if you have them
(``Hardware.from_toml``). Units are SI: bytes, bytes/s, FLOP/s, seconds.

Two of the efficiencies are calibrated on the ten published runs in ``published.py``: ``gemm_efficiency`` and ``overlap``.
These were measured by others, on other machines than those of the published runs:

- attention: cuDNN on an H100, FlashAttention-3 (arXiv 2407.08608), figures 5 and 6, head size 128. Causal forward reaches
  315, 410, 484, 518, 529, 539 TFLOP/s at 512 to 16,384 tokens, which ``0.56 L / (L + 385)`` of the peak meets within
  4%; the ratio of backward to forward (both without mask, 16,384 tokens) is 516 to 595.
- network: an all-reduce over 256 H100 moves 340 of the 400 GB/s of a node's eight ports (NVIDIA/nccl issue 1218); NVLink,
  about 360 of 450 GB/s in all-gathers of nccl-tests.
- all-to-all: a rank uses only its own port, but fills it (NVIDIA/nccl-tests issue 267); Megatron-Core's
  dispatch over 8 ranks of a node (arXiv 2603.07685: 1,265 us) runs at 0.9 of an all-gather's rate.
- launches: the host submits a kernel in 4 to 6 us (susun-blog.com/blog/pegainfer-3-cuda-graph, CUDA 13; 5 us are what developers
  expect, too: NVIDIA forum, thread 221413 on the latency of a kernel launch); 5 us are taken. If the queue is empty, as after a
  host wait, a PyTorch kernel starts about 20 us after its call (V100; NVIDIA technical blog, "Understanding the Visualization of
  Overhead and Latency in NVIDIA Nsight Systems"); ``host_sync`` contains that once. What PyTorch's dispatcher adds in eager
  mode is not counted; ``gemm_efficiency``, calibrated on eager runs, contains it.
- host memory: an H100 copies 57 of the 64 GB/s of PCIe 5.0 x16 one way, with pinned memory (NVIDIA/nvbandwidth issue 6), an A100 25
  of the 32 GB/s of PCIe 4.0 (ZaidQureshi/bam issue 54). The memory of such hosts is not slower: 614 GB/s of sixteen DDR5-4800
  channels for eight H100, 410 GB/s of sixteen DDR4-3200 channels for eight A100.

The rest (collective start-up, memory efficiency, half size of a product, host waits, split backward) are round
numbers.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from lightning_moefold.errors import HardwareError

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - the package's own Python is newer
    import tomli as tomllib

GIB = 2**30
#: Fields of a file that starts from no preset.
_NEEDED = ("gpus_per_node", "memory_gib", "memory_bandwidth_gb_s", "peak_tflops", "intra")
#: Kinds of devices, as PyTorch calls them.
DEVICES = ("cuda", "cpu")


@dataclass(frozen=True)
class Link:
    """A link from one rank to others.

    Args:
        bandwidth: Bytes/s of one rank in one direction (datasheet).
        latency: Seconds of one hop of a ring.
        efficiency: Share of ``bandwidth`` that a large all-gather reaches.
    """

    bandwidth: float
    latency: float
    efficiency: float

    @property
    def rate(self) -> float:
        """Bytes/s that a large all-gather reaches."""
        return self.bandwidth * self.efficiency


@dataclass(frozen=True)
class Kernels:
    """Which share of the peaks kernels reach. Defaults: a Hopper GPU.

    Args:
        gemm_efficiency: Share of the peak that an infinitely large matrix product reaches (power and clocks included).
        gemm_half_size: Length d of a product's side at which the product reaches half of that; each side counts as
            d/(d+half).
        attention_efficiency: Share of the peak that a fused attention kernel reaches, forward, on long sequences.
        attention_backward_ratio: Efficiency of that kernel in backward (five products instead of two, and atomics) over
            that in forward.
        attention_half_length: Number of keys at which attention reaches half of its efficiency (causal tiles on the
            diagonal).
        memory_efficiency: Share of the memory bandwidth that element-wise kernels reach.
        launch: Seconds of one kernel launch by the host. A layer is never faster than its launches.
        collective: Seconds that one collective costs before a byte moves.
        alltoall_efficiency: Bandwidth of an all-to-all relative to that of an all-gather on the same link.
        reduce_efficiency: Bandwidth of a reduce-scatter relative to that of an all-gather (gloo sums on the CPU).
        overlap: Share of the shorter of two overlapped activities (communication under compute) that is hidden.
        host_sync: Seconds lost when the host waits for token counts (dropless routing only).
        split_backward: Relative extra time of a backward cut into input and weight gradients.
        waiting: Share of a pipeline's bubble that costs time: 0 if ranks share cores, so that a waiting rank leaves its
            core to others.
    """

    gemm_efficiency: float = 0.70
    gemm_half_size: float = 128.0
    attention_efficiency: float = 0.56
    attention_backward_ratio: float = 0.87
    attention_half_length: float = 385.0
    memory_efficiency: float = 0.80
    launch: float = 5e-6
    collective: float = 12e-6
    alltoall_efficiency: float = 0.90
    reduce_efficiency: float = 1.0
    overlap: float = 0.65
    host_sync: float = 50e-6
    split_backward: float = 0.04
    waiting: float = 1.0


#: PCIe 5.0 and 4.0, sixteen lanes, with what copies of pinned memory reach.
_PCIE5 = Link(64e9, 10e-6, 0.89)
_PCIE4 = Link(32e9, 10e-6, 0.78)


@dataclass(frozen=True)
class Hardware:
    """A cluster of equal nodes.

    Args:
        name: Name to print.
        gpus_per_node: Number of ranks that share the fast link.
        peak_flops: Dense FLOP/s by dtype: ``bf16``, ``fp32``, and ``fp8``, ``fp64`` if supported.
        memory_bytes: Memory of one rank in bytes.
        memory_bandwidth: Bytes/s of one rank.
        intra: Link between ranks of a node.
        inter: Link between nodes; its bandwidth is the share of one rank.
        host: Link between a rank and its host's memory, one way.
        reserved_bytes: Memory that the model cannot use: driver context, communication buffers, 5% fragmentation.
        kernels: Efficiencies of kernels.
        device: Kind of device that a rank is: ``"cuda"`` or ``"cpu"``.
    """

    name: str
    gpus_per_node: int
    peak_flops: Mapping[str, float] = field(hash=False)
    memory_bytes: float
    memory_bandwidth: float
    intra: Link
    inter: Link
    reserved_bytes: float = 8e9
    kernels: Kernels = Kernels()
    device: str = "cuda"
    host: Link = _PCIE5

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise HardwareError(f"device={self.device!r} is not known; use {' or '.join(map(repr, DEVICES))}.")
        if self.gpus_per_node < 1:
            raise HardwareError(f"gpus_per_node={self.gpus_per_node} must be at least 1.")
        for name in ("memory_bytes", "memory_bandwidth"):
            if getattr(self, name) <= 0:
                raise HardwareError(f"{name}={getattr(self, name)} must be positive.")
        if not any(self.peak_flops.get(dtype, 0) > 0 for dtype in ("bf16", "fp32")):
            raise HardwareError(f"hardware {self.name!r} gives no peak for bf16 or fp32; add one to [peak_tflops].")

    def peak(self, dtype: str) -> float:
        """Returns the dense FLOP/s for ``dtype``; if the machine does not support it, that of the next wider dtype."""
        ladder = ("fp8", "bf16", "fp32", "fp64")
        for candidate in ladder[ladder.index(dtype) :]:
            if self.peak_flops.get(candidate, 0) > 0:
                return self.peak_flops[candidate]
        return min(value for value in self.peak_flops.values() if value > 0)

    @property
    def usable_bytes(self) -> float:
        """Bytes of a rank's memory that a plan may use."""
        return self.memory_bytes - self.reserved_bytes

    # ---- reading and writing -----------------------------------------------------------------------------------

    @classmethod
    def from_toml(cls, path: str | Path) -> Hardware:
        """Reads a file such as ``docs/planner.md`` shows; ``base`` names a preset whose values it changes.

        Raises:
            HardwareError: If the file is missing, is not TOML, or has unknown or missing fields.
        """
        file = Path(path)
        if not file.is_file():
            raise HardwareError(f"{file} does not exist; presets are {', '.join(PRESETS)}.")
        try:
            raw = tomllib.loads(file.read_text())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise HardwareError(f"{file} is not valid TOML ({error}).") from None
        try:
            return _from_mapping(raw, file.stem)
        except HardwareError as error:
            raise HardwareError(f"{file}: {error}") from None

    def to_toml(self) -> str:
        """Returns the hardware as a TOML text that :meth:`from_toml` reads."""
        lines = [
            f'name = "{self.name}"',
            f'device = "{self.device}"',
            f"gpus_per_node = {self.gpus_per_node}",
            f"memory_gib = {self.memory_bytes / GIB:.6g}",
            f"reserved_gib = {self.reserved_bytes / GIB:.6g}",
            f"memory_bandwidth_gb_s = {self.memory_bandwidth / 1e9:.6g}",
            "",
            "[peak_tflops]",
            *(f"{dtype} = {value / 1e12:.6g}" for dtype, value in self.peak_flops.items()),
        ]
        for name in ("intra", "inter", "host"):
            link: Link = getattr(self, name)
            lines += [
                "",
                f"[{name}]",
                f"bandwidth_gb_s = {link.bandwidth / 1e9:.6g}",
                f"latency_us = {link.latency * 1e6:.6g}",
                f"efficiency = {link.efficiency:.6g}",
            ]
        lines += ["", "[kernels]", *(f"{name} = {value:.6g}" for name, value in asdict(self.kernels).items())]
        return "\n".join(lines) + "\n"


def _from_mapping(raw: dict[str, Any], stem: str) -> Hardware:
    known = {"base", "name", "device", "gpus_per_node", "memory_gib", "reserved_gib", "memory_bandwidth_gb_s",
             "peak_tflops", "intra", "inter", "host", "kernels"}  # fmt: skip
    unknown = sorted(set(raw) - known)
    if unknown:
        raise HardwareError(_unknown(unknown[0], "", known))
    base = find_hardware(raw["base"]) if "base" in raw else None
    if base is None:
        missing = [n for n in _NEEDED if n not in raw]
        if not missing and isinstance(raw["intra"], dict) and "bandwidth_gb_s" not in raw["intra"]:
            missing = ["bandwidth_gb_s"]
        if missing:
            where = " of [intra]" if missing[0] == "bandwidth_gb_s" else ""
            raise HardwareError(
                f"field {missing[0]!r}{where} is missing; give it, or base = 'dgx-h100' to start from a preset."
            )
    numbers = _numbers(raw)
    if base is None:
        base = replace(PRESETS["dgx-h100"], **numbers)
        base = replace(base, inter=_link("intra", raw["intra"], base.intra)) if "inter" not in raw else base
    links: dict[str, Any] = {
        name: _link(name, raw[name], getattr(base, name)) for name in ("intra", "inter", "host") if name in raw
    }
    kernels = _checked("kernels", raw.get("kernels", {}), {f.name for f in fields(Kernels)})
    changes = numbers | links | {"kernels": replace(base.kernels, **kernels)}
    return replace(base, name=raw.get("name", stem), device=raw.get("device", base.device), **changes)


def _numbers(raw: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of Hardware that a file gives as numbers, in SI units."""
    scale = {"gpus_per_node": ("gpus_per_node", 1), "memory_gib": ("memory_bytes", GIB),
             "reserved_gib": ("reserved_bytes", GIB), "memory_bandwidth_gb_s": ("memory_bandwidth", 1e9)}  # fmt: skip
    for name in scale:
        if name in raw and not isinstance(raw[name], (int, float)):
            raise HardwareError(f"{name}={raw[name]!r} must be a number.")
    found: dict[str, Any] = {target: raw[name] * factor for name, (target, factor) in scale.items() if name in raw}
    if "peak_tflops" in raw:
        peaks = _checked("peak_tflops", raw["peak_tflops"], {"fp8", "bf16", "fp32", "fp64"})
        found["peak_flops"] = {dtype: value * 1e12 for dtype, value in peaks.items()}
    return found


def _link(table: str, raw: dict[str, Any], base: Link) -> Link:
    values = _checked(table, raw, {"bandwidth_gb_s", "latency_us", "efficiency"})
    return Link(
        values.get("bandwidth_gb_s", base.bandwidth / 1e9) * 1e9,
        values.get("latency_us", base.latency * 1e6) * 1e-6,
        values.get("efficiency", base.efficiency),
    )


def _unknown(name: str, where: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    guess = f" (did you mean {close[0]!r}?)" if close else ""
    return f"unknown field {name!r}{where}{guess}; the fields are {', '.join(sorted(known))}."


def _checked(table: str, raw: Any, known: set[str]) -> dict[str, float]:
    if not isinstance(raw, dict):
        raise HardwareError(f"[{table}] must be a table.")
    for name, value in raw.items():
        if name not in known:
            raise HardwareError(_unknown(name, f" in [{table}]", known))
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
            raise HardwareError(f"{name}={value!r} in [{table}] must be a number that is not negative.")
    return dict(raw)


#: Ring hops and achievable fractions of NCCL on NVLink and InfiniBand. Each rank has its own 400 Gb/s port.
_NVLINK4 = Link(450e9, 2e-6, 0.80)
_NDR400 = Link(50e9, 6e-6, 0.85)

_HOPPER_PEAKS = {"fp8": 1979e12, "bf16": 989.5e12, "fp32": 67e12, "fp64": 67e12}

PRESETS: dict[str, Hardware] = {
    # NVIDIA H100 SXM datasheet: 989.5 TFLOP/s bf16 dense, 80 GB, 3.35 TB/s; NVLink 900 GB/s both ways; 8 x 400 Gb/s.
    "dgx-h100": Hardware(
        "dgx-h100", 8, _HOPPER_PEAKS, 80 * GIB, 3.35e12, _NVLINK4, _NDR400
    ),
    # NVIDIA H200 SXM datasheet: the compute of H100, 141 GB, 4.8 TB/s.
    "dgx-h200": Hardware(
        "dgx-h200", 8, _HOPPER_PEAKS, 141e9, 4.8e12, _NVLINK4, _NDR400
    ),
    # NVIDIA A100 SXM 80 GB datasheet: 312 TFLOP/s bf16, 2.04 TB/s, NVLink 600 GB/s both ways; DGX A100: 8 x 200 Gb/s.
    # Smaller products fill its smaller matrix units, and it throttles less. FlashAttention-2 reaches 50 to 73% of its
    # peak (arXiv 2307.08691).
    "a100": Hardware(
        "a100", 8, {"bf16": 312e12, "fp32": 19.5e12, "fp64": 19.5e12}, 80 * GIB, 2.04e12,
        Link(300e9, 2e-6, 0.80), Link(25e9, 6e-6, 0.85),
        kernels=Kernels(gemm_efficiency=0.85, gemm_half_size=96.0, attention_efficiency=0.62), host=_PCIE4,
    ),
    # NVIDIA DGX B200 datasheet: 2.25 PFLOP/s bf16 dense, 180 GB, 8 TB/s; NVLink 1.8 TB/s both ways; 8 x 400 Gb/s.
    "b200": Hardware(
        "b200", 8, {"fp8": 4500e12, "bf16": 2250e12, "fp32": 75e12, "fp64": 37e12}, 180e9, 8e12,
        Link(900e9, 2e-6, 0.80), _NDR400, kernels=Kernels(gemm_half_size=192.0),
    ),
    # A small CPU machine: 8 ranks of one core, AVX2 (about 50 GFLOP/s fp32 each), gloo over loopback. Calibrate your
    # own.
    "cpu": Hardware(
        "cpu", 8, {"fp32": 50e9, "fp64": 25e9}, 4 * GIB, 5e9, Link(1e9, 200e-6, 0.80), Link(1e9, 500e-6, 0.80),
        reserved_bytes=0.5 * GIB,
        kernels=Kernels(gemm_half_size=16.0, launch=15e-6, collective=1e-3, overlap=0.0, host_sync=20e-6),
        device="cpu",
    ),
}  # fmt: skip

_ALIASES = {"h100": "dgx-h100", "h200": "dgx-h200", "dgx-a100": "a100", "dgx-b200": "b200"}


def find_hardware(name: str) -> Hardware:
    """Returns a preset by name, or reads a TOML file by path.

    Raises:
        HardwareError: If there is neither.
    """
    key = _ALIASES.get(name.lower(), name.lower())
    if key in PRESETS:
        return PRESETS[key]
    if name.endswith(".toml") or Path(name).is_file():
        return Hardware.from_toml(name)
    raise HardwareError(f"hardware {name!r} is not known; use {', '.join(PRESETS)}, or a TOML file.")

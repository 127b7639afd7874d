# SPDX-License-Identifier: Apache-2.0
"""Peak arithmetic rates of devices, relative to which model FLOPs utilisation is measured.

All rates are *dense*. Datasheets print tensor core rates for matrices with 2:4 sparsity, which are twice as high as a
dense product can reach. 16-bit rates are those with accumulation in float32, which torch's products use.
"""

from __future__ import annotations

import re
import statistics
import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DevicePeak:
    """Dense peak rates of one device in TFLOP/s; None if the device does not support the dtype or its datasheet has no rate.

    Args:
        half: Rate of float16, and of bfloat16 if the device has it.
        tf32: Rate of float32 matrices multiplied in TensorFloat-32.
        fp32: Rate of float32.
        fp64: Rate of float64, on tensor cores if they support it.
        bfloat16: Whether the device has bfloat16.
        float8: Whether the device has float8, which is twice as fast as ``half`` on all of them.
    """

    half: float
    tf32: float | None
    fp32: float
    fp64: float | None = None
    bfloat16: bool = True
    float8: bool = False

    def flops(self, dtype: torch.dtype, *, tf32: bool = False) -> float | None:
        """Returns the peak in FLOP/s for products in ``dtype``; None if unknown."""
        rate: float | None = None
        if dtype is torch.float32:
            rate = self.tf32 if tf32 and self.tf32 is not None else self.fp32
        elif dtype is torch.float64:
            rate = self.fp64
        elif dtype is torch.float16 or (dtype is torch.bfloat16 and self.bfloat16):
            rate = self.half
        elif dtype in (torch.float8_e4m3fn, torch.float8_e5m2) and self.float8:
            rate = 2 * self.half
        return None if rate is None else rate * 1e12


#: Patterns of ``torch.cuda.get_device_name`` in lower case; the first that matches counts.
_PEAKS: tuple[tuple[str, DevicePeak], ...] = (
    # NVIDIA GB300 NVL72 specifications (per GPU; FP64 is nearly gone)
    (r"\bgb300\b", DevicePeak(2500, 1250, 80, 1.3, float8=True)),
    # NVIDIA HGX B300 specifications, divided by its 8 GPUs
    (r"\bb300\b", DevicePeak(2250, 1125, 75, 1.25, float8=True)),
    # NVIDIA GB200 NVL72 datasheet (per GPU)
    (r"\bgb200\b", DevicePeak(2500, 1250, 80, 40, float8=True)),
    # NVIDIA HGX B200 in the Blackwell datasheet (per GPU)
    (r"\bb200\b", DevicePeak(2250, 1100, 75, 37, float8=True)),
    # NVIDIA HGX B100 in the Blackwell architecture technical brief (per GPU)
    (r"\bb100\b", DevicePeak(1750, 900, 60, 30, float8=True)),
    # NVIDIA GH200 Grace Hopper superchip datasheet
    (r"\bgh200\b", DevicePeak(989.4, 494.7, 66.9, 66.9, float8=True)),
    # NVIDIA H200 datasheet, H200 NVL column
    (r"\bh200 nvl\b", DevicePeak(835.5, 417.5, 60, 60, float8=True)),
    # NVIDIA H200 datasheet, H200 SXM column
    (r"\bh200\b", DevicePeak(989.4, 494.7, 66.9, 66.9, float8=True)),
    # NVIDIA H20 datasheet
    (r"\bh20\b", DevicePeak(148, 74, 44, 1, float8=True)),
    # NVIDIA H100 datasheet, H100 NVL column (one GPU of the pair)
    (r"\bh100 nvl\b", DevicePeak(835.5, 417.5, 60, 60, float8=True)),
    # NVIDIA H100 datasheet of 2022, PCIe column
    (r"\bh100 pcie\b|\bh100\b.*\bhbm2e\b", DevicePeak(756, 378, 51.2, 51.2, float8=True)),
    # NVIDIA H100 datasheet, SXM column ("H100 80GB HBM3")
    (r"\bh100\b.*\b(hbm3|sxm\d?)\b", DevicePeak(989.4, 494.7, 66.9, 66.9, float8=True)),
    # NVIDIA H800 datasheet: the H100 with little float64; PCIe and SXM columns
    (r"\bh800 pcie\b", DevicePeak(756, 378, 51.2, 0.8, float8=True)),
    (r"\bh800\b", DevicePeak(989.4, 494.7, 66.9, 1, float8=True)),
    # NVIDIA A100 datasheet: SXM and PCIe alike; the A800 differs in its links only
    (r"\ba[18]00\b", DevicePeak(312, 156, 19.5, 19.5)),
    # NVIDIA A30 datasheet
    (r"\ba30\b", DevicePeak(165, 82, 10.3, 10.3)),
    # NVIDIA A40 datasheet
    (r"\ba40\b", DevicePeak(149.7, 74.8, 37.4)),
    # NVIDIA A10 datasheet (the A10G is another, slower device)
    (r"\ba10\b", DevicePeak(125, 62.5, 31.2)),
    # NVIDIA RTX A6000 datasheet
    (r"\brtx a6000\b", DevicePeak(154.8, 77.4, 38.7)),
    # NVIDIA L20 datasheet
    (r"\bl20\b", DevicePeak(119.5, 59.8, 59.8, float8=True)),
    # NVIDIA L40S datasheet
    (r"\bl40s\b", DevicePeak(362.05, 183, 91.6, float8=True)),
    # NVIDIA L40 datasheet
    (r"\bl40\b", DevicePeak(181.05, 90.5, 90.5, float8=True)),
    # NVIDIA L4 datasheet
    (r"\bl4\b", DevicePeak(121, 60, 30.3, float8=True)),
    # NVIDIA RTX 6000 Ada Generation datasheet
    (r"\brtx 6000 ada\b", DevicePeak(364.2, 182.1, 91.1, float8=True)),
    # NVIDIA RTX Blackwell GPU architecture white paper, appendix; D and laptop GPUs are others, so the name ends here
    (r"\brtx 5090$", DevicePeak(209.5, 104.8, 104.8, float8=True)),
    # NVIDIA Ada GPU architecture white paper, appendix A
    (r"\brtx 4090$", DevicePeak(165.2, 82.6, 82.6, float8=True)),
    # NVIDIA Ampere GA102 GPU architecture white paper, appendix A
    (r"\brtx 3090$", DevicePeak(71, 35.6, 35.6)),
    # NVIDIA V100 datasheet
    (r"\bv100-sxm", DevicePeak(125, None, 15.7, 7.8, bfloat16=False)),
    (r"\bv100-pcie", DevicePeak(112, None, 14, 7, bfloat16=False)),
    # NVIDIA T4 datasheet
    (r"\bt4\b", DevicePeak(65, None, 8.1, bfloat16=False)),
    # AMD Instinct datasheets (matrix rates, without sparsity); the MI350 series has no TF32
    (r"\bmi300a\b", DevicePeak(980.6, 490.3, 122.6, 122.6, float8=True)),
    (r"\bmi3(00|25)x\b", DevicePeak(1307.4, 653.7, 163.4, 163.4, float8=True)),
    (r"\bmi350x\b", DevicePeak(2306.9, None, 144.2, 72.1, float8=True)),
    (r"\bmi355x\b", DevicePeak(2516.6, None, 157.3, 78.6, float8=True)),
)


def device_peak(name: str) -> DevicePeak | None:
    """Returns the peak rates of a device; None if it is not in the table or is a slice of a device (MIG).

    Args:
        name: Name returned by ``torch.cuda.get_device_name``, such as ``"NVIDIA H100 80GB HBM3"``.
    """
    name = name.lower().strip()
    if re.search(r"\bmig\b", name):
        return None
    return next((peak for pattern, peak in _PEAKS if re.search(pattern, name)), None)


def compute_dtype(precision: str) -> torch.dtype:
    """Returns the dtype in which a Trainer of this ``precision`` multiplies matrices; float32 if it is unknown."""
    kinds = {"64": torch.float64, "bf16": torch.bfloat16, "16": torch.float16}
    return kinds.get(str(precision).split("-")[0], torch.float32)


def cuda_peak_flops(device: torch.device, precision: str) -> float | None:
    """Returns the dense peak of a GPU for a Trainer's ``precision`` in FLOP/s, or None if it is unknown.

    float32 counts as TensorFloat-32 if ``torch.set_float32_matmul_precision`` allows it.
    """
    peak = device_peak(torch.cuda.get_device_name(device))
    if peak is None:
        return None
    return peak.flops(compute_dtype(precision), tf32=torch.get_float32_matmul_precision() != "highest")


def measured_peak_flops(dtype: torch.dtype, seconds: float = 0.3, size: int = 512) -> float:
    """Measures a square matrix product on this process's CPU threads in FLOP/s: the median over ``seconds``.

    It is used on machines without a datasheet. It does not change the random state.

    Args:
        dtype: Data type of the matrices.
        seconds: Duration of the measurement; at least three products are timed.
        size: Number of rows and columns.
    """
    a, b = (torch.ones(size, size, dtype=dtype) for _ in range(2))
    a @ b  # warm-up: starts the threads and touches the memory
    rates: list[float] = []
    finish = time.perf_counter() + seconds
    while len(rates) < 3 or time.perf_counter() < finish:
        start = time.perf_counter()
        a @ b
        rates.append(2 * size**3 / (time.perf_counter() - start))
    return statistics.median(rates)

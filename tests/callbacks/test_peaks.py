# SPDX-License-Identifier: Apache-2.0
"""Peaks by device name and dtype, and the measured one."""

from __future__ import annotations

import pytest
import torch

from lightning_moefold.callbacks.peaks import compute_dtype, device_peak, measured_peak_flops
from lightning_moefold.planner import PRESETS


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA A800 80GB PCIe", 312),
        ("NVIDIA H800", 989.4),
        ("NVIDIA H800 PCIe", 756),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 SXM5 80GB", 989.4),
        ("NVIDIA H100 80GB HBM2e", 756),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA H20", 148),
        ("NVIDIA B100", 1750),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA B300", 2250),
        ("NVIDIA GB300", 2500),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L40", 181.05),
        ("NVIDIA L4", 121),
        ("NVIDIA A10", 125),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA L20", 119.5),
        ("AMD Instinct MI300X", 1307.4),
        ("AMD Instinct MI300X VF", 1307.4),
        ("AMD Instinct MI325X", 1307.4),
        ("AMD Instinct MI355X", 2516.6),
    ],
)
def test_dense_bf16_by_name(name: str, tflops: float) -> None:
    peak = device_peak(name)
    assert peak is not None
    assert peak.flops(torch.bfloat16) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A10G",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA A100X",
        "NVIDIA L2",
        "AMD Instinct MI250X/MI250",
        "Some GPU of next year",
    ],
)
def test_devices_that_are_not_known(name: str) -> None:
    assert device_peak(name) is None


def test_dtypes() -> None:
    hopper, volta, ada = map(device_peak, ("NVIDIA H100 80GB HBM3", "Tesla V100-SXM2-32GB", "NVIDIA L4"))
    assert hopper is not None
    assert volta is not None
    assert ada is not None
    assert hopper.flops(torch.float32) == pytest.approx(66.9e12)
    assert hopper.flops(torch.float32, tf32=True) == pytest.approx(494.7e12)
    assert hopper.flops(torch.float64) == pytest.approx(66.9e12)
    assert volta.flops(torch.bfloat16) is None
    assert volta.flops(torch.float16) == pytest.approx(125e12)
    assert volta.flops(torch.float32, tf32=True) == pytest.approx(15.7e12)
    assert ada.flops(torch.float64) is None
    assert hopper.flops(torch.int8) is None
    assert hopper.flops(torch.float8_e4m3fn) == pytest.approx(1978.8e12)  # as many as its sparse 16-bit rate
    assert volta.flops(torch.float8_e4m3fn) is None


def test_no_tensor_core_is_slower_than_the_plain_cores() -> None:
    """A sparse figure among dense ones, or a slip of a column, would break the order of the dtypes."""
    from lightning_moefold.callbacks.peaks import _PEAKS

    for pattern, peak in _PEAKS:
        tf32 = peak.tf32 or peak.fp32
        assert peak.half / tf32 == pytest.approx(2, rel=0.03) or peak.half > tf32 >= peak.fp32, pattern
        assert peak.fp64 is None or peak.fp64 <= peak.fp32, pattern


# Streaming multiprocessors, dense bf16 FMAs of one in a cycle, and boost clock in GHz, from NVIDIA's architecture white
# papers: what the silicon can do, without a datasheet's footnotes. A sparse figure would be off by two.
SILICON = {
    "NVIDIA A100-SXM4-80GB": (108, 1024, 1.410),
    "NVIDIA H100 80GB HBM3": (132, 2048, 1.830),
    "NVIDIA H100 PCIe": (114, 2048, 1.620),
    "NVIDIA H100 NVL": (132, 2048, 1.545),
    "NVIDIA H200": (132, 2048, 1.830),
    "NVIDIA H20": (78, 512, 1.850),
    "NVIDIA A40": (84, 512, 1.740),
    "NVIDIA L40S": (142, 512, 2.490),
    "NVIDIA L40": (142, 256, 2.490),
    "NVIDIA L4": (58, 512, 2.040),
    "NVIDIA GeForce RTX 4090": (128, 256, 2.520),
    "NVIDIA GeForce RTX 3090": (82, 256, 1.695),
    "NVIDIA GeForce RTX 5090": (170, 256, 2.407),
    "Tesla T4": (40, 512, 1.590),
    "Tesla V100-SXM2-32GB": (80, 512, 1.530),
}


@pytest.mark.parametrize("name", SILICON)
def test_datasheets_agree_with_the_silicon(name: str) -> None:
    units, products, gigahertz = SILICON[name]
    peak = device_peak(name)
    assert peak is not None
    assert peak.flops(torch.float16) == pytest.approx(2 * units * products * gigahertz * 1e9, rel=0.05)


@pytest.mark.parametrize(
    ("preset", "name"),
    [("dgx-h100", "NVIDIA H100 80GB HBM3"), ("a100", "NVIDIA A100-SXM4-80GB"), ("b200", "NVIDIA B200")],
)
def test_the_planner_knows_the_same_peaks(preset: str, name: str) -> None:
    peak = device_peak(name)
    assert peak is not None
    assert PRESETS[preset].peak("bf16") == pytest.approx(peak.flops(torch.bfloat16), rel=1e-3)
    if "fp8" in PRESETS[preset].peak_flops:
        assert PRESETS[preset].peak("fp8") == pytest.approx(peak.flops(torch.float8_e4m3fn), rel=1e-3)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("64-true", torch.float64),
        ("32-true", torch.float32),
        ("bf16-mixed", torch.bfloat16),
        ("bf16-true", torch.bfloat16),
        ("16-mixed", torch.float16),
        ("transformer-engine", torch.float32),
    ],
)
def test_dtype_of_a_precision(precision: str, dtype: torch.dtype) -> None:
    assert compute_dtype(precision) is dtype


def test_measurement() -> None:
    before = torch.get_rng_state()
    assert 1e8 < measured_peak_flops(torch.float32, seconds=0.01, size=128) < 1e14
    assert torch.equal(before, torch.get_rng_state())

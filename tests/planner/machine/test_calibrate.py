# SPDX-License-Identifier: Apache-2.0
"""Fits of the calibration, and the calibration itself on two CPU ranks."""

import pytest

from lightning_moefold.cli.main import main
from lightning_moefold.planner import PRESETS, find_hardware
from lightning_moefold.planner.machine.calibrate import ON_CPU, ON_GPU, Measurements, describe, fit_link, fit_products
from lightning_moefold.planner.machine.kernels import Compute

SIDES = [(64, 64, 64), (256, 256, 256), (512, 128, 64), (32, 512, 512), (1024, 1024, 1024)]


def made_up(rate, half):
    return [(m, n, k, 2 * m * n * k * (1 + half / m) * (1 + half / n) * (1 + half / k) / rate) for m, n, k in SIDES]


@pytest.mark.parametrize(("rate", "half"), [(50e9, 0.0), (50e9, 24.0), (700e12, 150.0)])
def test_products_are_recovered(rate, half):
    found_rate, found_half, error = fit_products(made_up(rate, half))
    assert found_rate == pytest.approx(rate, rel=0.1)
    assert found_half == pytest.approx(half, rel=0.1, abs=0.1)
    assert error < 0.03


def test_links_are_recovered():
    start, rate = fit_link([(size, 1e-4 + 0.75 * size / 1e9) for size in (1000, 10**6, 10**8)], 0.75)
    assert start == pytest.approx(1e-4, rel=0.02)
    assert rate == pytest.approx(1e9, rel=0.02)


@pytest.mark.parametrize(("sizes", "machine"), [(ON_GPU, "dgx-h100"), (ON_GPU, "b200"), (ON_CPU, "cpu")])
def test_sizes_show_what_a_machine_can_do(sizes, machine):
    """The largest message is bandwidth and not start-up, the smallest the opposite; the long row is all attention."""
    hardware = PRESETS[machine]
    kernels, link = hardware.kernels, hardware.intra.rate
    assert max(sizes.messages) / 2 / link > 5 * kernels.collective
    assert min(sizes.messages) / 2 / link < kernels.collective / 10
    assert 4 * max(sizes.messages) < hardware.usable_bytes
    length, width = max(sizes.lengths), sizes.heads * sizes.head_size
    assert 2 * width * length**2 / hardware.peak("bf16") > 7 * kernels.launch
    if machine != "cpu":
        assert max(sizes.lengths) > 10 * kernels.attention_half_length > min(sizes.lengths)
        assert sizes.head_size == 128
        assert sizes.heads * max(sizes.lengths) / 128 > 10 * 132, "ten blocks of rows for each multiprocessor"


def test_the_description_predicts_what_was_measured():
    lengths = [(64, 5e9, 4e9), (256, 10e9, 8e9)]
    messages = [(4096, 1e-4), (2**23, 1e-2)]
    measured = Measurements(made_up(50e9, 24.0), lengths, 5e9, 1e-5, messages, messages, messages)
    hardware = describe(measured, 2, "fp32", 4e9, "box", cores=2)
    assert hardware.kernels.waiting == 1
    assert hardware.device == "cpu"
    assert describe(measured, 2, "bf16", 4e9, "gpus").device == "cuda"
    assert describe(measured, 4, "fp32", 4e9, "box", cores=2).kernels.waiting == 0
    compute = Compute(hardware, "fp32", 4)
    for m, n, k, seconds in measured.products[1:]:
        assert compute.gemm(m, n, k) == pytest.approx(seconds, rel=0.1)
    for length, forward, _ in lengths:
        flops = 4 * length * (length / 2) * 512
        assert compute.attention(length, length / 2, 512, length)[0] == pytest.approx(flops / forward, rel=0.05)


@pytest.mark.slow
def test_two_cpu_ranks(tmp_path, capsys):
    file = tmp_path / "box.toml"
    assert main(["calibrate", "--cpu", "--ranks", "2", "--output", str(file)]) == 0
    hardware = find_hardware(str(file))
    assert hardware.peak("fp32") > 1e8
    assert 0 <= hardware.kernels.gemm_half_size < 1e4
    assert "matrix products" in capsys.readouterr().out
    arguments = [
        "plan",
        "--model",
        "qwen1.5-moe-a2.7b",
        "--gpus",
        "8",
        "--hardware",
        str(file),
        "--precision",
        "32-true",
    ]
    assert main([*arguments, "--global-batch-size", "8", "--routing", "balanced"]) in (0, 1)

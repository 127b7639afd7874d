# SPDX-License-Identifier: Apache-2.0
"""Machines, their files, and kernel times."""

import pytest

from lightning_moefold.callbacks.peaks import device_peak
from lightning_moefold.planner import PRESETS, Hardware, HardwareError, PlanError, find_hardware, machine_for
from lightning_moefold.planner.machine.devices import find_device
from lightning_moefold.planner.machine.kernels import Compute

MINIMAL = """
gpus_per_node = 4
memory_gib = 24
memory_bandwidth_gb_s = 900
[peak_tflops]
bf16 = 100
[intra]
bandwidth_gb_s = 25
"""


@pytest.mark.parametrize("name", PRESETS)
def test_toml_round_trip(tmp_path, name):
    file = tmp_path / "machine.toml"
    file.write_text(PRESETS[name].to_toml())
    again = find_hardware(str(file))
    assert again.to_toml() == PRESETS[name].to_toml()
    assert again.device == ("cpu" if name == "cpu" else "cuda")


def test_a_small_file_is_enough(tmp_path):
    (tmp_path / "box.toml").write_text(MINIMAL)
    box = Hardware.from_toml(tmp_path / "box.toml")
    assert (box.name, box.gpus_per_node, box.peak("bf16")) == ("box", 4, 100e12)
    assert box.inter == box.intra
    (tmp_path / "slow.toml").write_text('base = "dgx-h100"\n[inter]\nbandwidth_gb_s = 12.5\n')
    slow = find_hardware(str(tmp_path / "slow.toml"))
    assert slow.inter.bandwidth == 12.5e9
    assert slow.intra == PRESETS["dgx-h100"].intra


@pytest.mark.parametrize(("text", "message"), [
    ("gpus = 8", "unknown field 'gpus'"), ("gpus_per_node = 8", "'memory_gib' is missing"), ("[", "not valid TOML"),
    ('base = "dgx-h100"\n[kernels]\nspeed = 1', "unknown field 'speed'"), ('base = "tpu"', "not known"),
    ('base = "dgx-h100"\n[peak_tflops]\nbf16 = "fast"', "must be a number"),
    ('base = "dgx-h100"\ndevice = "tpu"', "device='tpu' is not known; use 'cuda' or 'cpu'"),
])  # fmt: skip
def test_bad_files_are_refused(tmp_path, text, message):
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(HardwareError, match=message):
        Hardware.from_toml(tmp_path / "bad.toml")


def test_a_missing_dtype_runs_on_the_next_wider_unit():
    assert PRESETS["cpu"].peak("bf16") == PRESETS["cpu"].peak("fp32")
    assert PRESETS["a100"].peak("fp8") == PRESETS["a100"].peak("bf16")


def test_small_products_are_slower_per_flop():
    compute = Compute(PRESETS["dgx-h100"], "bf16", 2)

    def rate(*sides):
        return 2 * sides[0] * sides[1] * sides[2] / compute.gemm(*sides)

    assert rate(8192, 8192, 8192) < PRESETS["dgx-h100"].peak("bf16") * 0.7
    assert rate(8192, 8192, 8192) > rate(2048, 2048, 2048) > rate(256, 2048, 2048) > rate(16, 2048, 2048)
    assert compute.gemm(512, 1024, 2048) == pytest.approx(compute.gemm(2048, 512, 1024))
    assert compute.gemm(512, 1024, 2048, groups=8) == pytest.approx(8 * compute.gemm(512, 1024, 2048))
    # One row: as slow as reading the weight.
    assert compute.gemm(1, 8192, 8192) == pytest.approx(compute.stream(2 * (8192 * 8192 + 2 * 8192)))


@pytest.mark.parametrize(("device", "name", "bandwidth", "nvlink"), [
    ("NVIDIA H100 80GB HBM3", "dgx-h100", 3.35e12, 450e9), ("NVIDIA H100 SXM5 80GB", "dgx-h100", 3.35e12, 450e9),
    ("NVIDIA H200", "dgx-h200", 4.8e12, 450e9), ("NVIDIA H800", "h800", 3.35e12, 200e9),
    ("NVIDIA A100-SXM4-80GB", "a100", 2.04e12, 300e9), ("NVIDIA A100-SXM4-40GB", "a100-40gb", 1.555e12, 300e9),
    ("NVIDIA A800-SXM4-80GB", "a800", 2.04e12, 200e9), ("NVIDIA B200", "b200", 8e12, 900e9),
])  # fmt: skip
def test_machines_by_the_name_of_their_gpus(device, name, bandwidth, nvlink):
    found = find_device(device)
    assert (found.name, found.memory_bandwidth, found.intra.bandwidth) == (name, bandwidth, nvlink)
    peak = device_peak(device)
    assert peak is not None
    assert found.peak("bf16") == pytest.approx(peak.half * 1e12, rel=1e-3)
    assert machine_for(device, 4, 70e9).memory_bytes == 70e9


@pytest.mark.parametrize(("device", "reason"), [
    ("NVIDIA H100 PCIe", ", a card,"), ("NVIDIA H100 NVL", ", a card,"), ("NVIDIA H200 NVL", ", a card,"),
    ("NVIDIA H100 80GB HBM2e", ", a card,"), ("NVIDIA A100-PCIE-40GB", ", a card,"), ("NVIDIA A100 80GB PCIe", ", a card,"),
    ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", ", a slice of a GPU,"), ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", ", a slice of a GPU,"),
    ("NVIDIA GH200 480GB", ", a superchip,"), ("NVIDIA GB200", ", a superchip,"), ("NVIDIA H20", ";"), ("NVIDIA A100X", ";"),
    ("NVIDIA L40S", ";"), ("Tesla V100-SXM2-32GB", ";"), ("AMD Instinct MI300X", ";"), ("NVIDIA H2000", ";"),
])  # fmt: skip
def test_other_gpus_are_to_be_measured(device, reason):
    with pytest.raises(HardwareError) as caught:
        find_device(device)
    message = str(caught.value)
    assert message.startswith(f"the planner knows no machine with '{device}'{reason}")
    assert "moefold calibrate" in message
    assert "\n" not in message
    with pytest.raises(PlanError, match="no machine with"):
        machine_for(device, 8)

# SPDX-License-Identifier: Apache-2.0
"""Constants of a plan: whole numbers from the planner's machine model."""

from __future__ import annotations

from dataclasses import astuple, fields, replace

import pytest

from lightning_moefold.balance.costs import BalanceCosts
from lightning_moefold.errors import InputError
from lightning_moefold.planner.machine.hardware import find_hardware


def test_break_even_is_what_the_roofline_says() -> None:
    """n > (2/3) FLOP/s over byte/s, for bf16 weights out and gradients back: about a thousand rows over NVLink."""
    hardware = find_hardware("dgx-h100")
    costs = BalanceCosts.of(hardware, 8192, 8192, parts=8)
    rate = hardware.peak("bf16") * hardware.kernels.gemm_efficiency
    expected = 2 / 3 * rate / (hardware.intra.rate * hardware.kernels.alltoall_efficiency)
    assert costs.break_even_rows == pytest.approx(expected, rel=0.25)  # trips and activations make a row dearer
    between = BalanceCosts.of(hardware, 8192, 8192, parts=16)
    assert between.far_copy_ps > 8 * between.near_copy_ps
    assert between.copy_ps(0, 7) == between.near_copy_ps
    assert between.copy_ps(0, 8) == between.far_copy_ps


def test_etp_and_edp_cut() -> None:
    whole = BalanceCosts.of(find_hardware("dgx-h100"), 4096, 1536, parts=4)
    halved = BalanceCosts.of(find_hardware("dgx-h100"), 4096, 1536, parts=4, etp=2, edp=2)
    assert halved.copy_bytes * 2 == whole.copy_bytes
    assert halved.move_bytes * 4 == whole.move_bytes
    assert (whole.parts_per_node, halved.parts_per_node) == (8, 4)


def test_all_are_whole_numbers_that_can_be_sent() -> None:
    costs = BalanceCosts.of(find_hardware("cpu"), 256, 512, parts=2, dtype="fp32")
    sent = astuple(costs)
    assert all(type(value) is int for value in sent)
    assert BalanceCosts(*sent) == costs
    assert len(sent) == len(fields(costs))


def test_moves_take_as_long_as_the_busiest_rank() -> None:
    costs = replace(
        BalanceCosts.of(find_hardware("dgx-h100"), 64, 64, parts=4), near_move_ps=10, far_move_ps=100, parts_per_node=2
    )
    assert costs.move_ps([0, 0, 1, 2], [0, 0, 1, 2], 4) == 0
    assert costs.move_ps([0, 0, 1, 2], [1, 1, 0, 2], 4) == 20
    assert costs.move_ps([0, 0, 1, 2], [0, 2, 1, 0], 4) == 100


@pytest.mark.parametrize(
    ("change", "message"),
    [({"row_ps": 0}, "row_ps=0 of the balance costs must be a whole number of at least 1"),
     ({"margin_ppm": -1}, "margin_ppm=-1"), ({"near_copy_ps": 1.5}, "near_copy_ps=1.5")],
)  # fmt: skip
def test_bad_values(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(BalanceCosts.of(find_hardware("dgx-h100"), 64, 64, parts=4), **change)

# SPDX-License-Identifier: Apache-2.0
"""Fake quantisation equals a loop over blocks of numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_moefold import MoECausalLM
from lightning_moefold.compression.analysis import analyze
from lightning_moefold.compression.quantizing import Bits, quantize, rounded
from lightning_moefold.errors import InputError
from lightning_moefold.testing import make_checkpoint
from tests.compression.naive import calibration_rows
from tests.compression.test_analysis import EXACT


def naive(vector: list[float], bits: int, block: int) -> list[float]:
    found = []
    for start in range(0, len(vector), block):
        part = vector[start : start + block]
        if bits == 1:
            mean = sum(map(abs, part)) / len(part)
            found += [-mean if w < 0 else mean for w in part]
            continue
        levels = [min(part) + (max(part) - min(part)) * i / (2**bits - 1) for i in range(2**bits)]
        found += [min(levels, key=lambda level: abs(level - w)) for w in part]
    return found


def test_rounding_takes_the_nearest_level() -> None:
    vectors_VD = torch.randn(6, 20, dtype=torch.float64)
    bits_V = torch.tensor([1, 2, 3, 4, 8, 1])
    found = rounded(vectors_VD, bits_V, 8)
    for vector, bits, expected in zip(vectors_VD.tolist(), bits_V.tolist(), found, strict=True):
        np.testing.assert_allclose(naive(vector, bits, 8), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(rounded(torch.zeros(1, 8), torch.tensor([2]), 4), torch.zeros(1, 8))


def test_groups_go_by_energy() -> None:
    how = Bits((8, 4, 2), (0.1, 0.3, 0.6))
    assert how.of(np.arange(10.0)).tolist() == [2] * 6 + [4] * 3 + [8]
    assert how.of(np.array([5.0, 1, 1, 9])).tolist() == [4, 2, 2, 4]  # round(0.6 * 4) = 2, round(0.9 * 4) = 4
    assert how.mean == pytest.approx(3.2)
    assert how.stored == pytest.approx(3.45)


def test_the_vectors_of_a_micro_expert_have_its_bits(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model", "qwen2_moe")
    energies, how = analyze(path, calibration_rows(), EXACT), Bits((8, 4, 2), (0.1, 0.3, 0.6), block=16)
    errors = quantize(path, energies, tmp_path / "out", how)
    before, after = (
        dict(MoECausalLM.from_pretrained(p, router_aux_loss_coef=0.0).named_parameters())
        for p in (path, tmp_path / "out")
    )
    for row in range(2):
        layer = f"model.layers.{row}.mlp"
        bits_N = how.of(np.concatenate([energies.energy[row].ravel(), energies.shared_energy[row]]))
        for channel in (0, 17, 40, 63):
            expert, f = divmod(channel, 16)
            for part in ("gate_proj", "up_proj", "down_proj"):
                old, new = (d[f"{layer}.experts.{part}"][expert] for d in (before, after))
                old, new = (t[:, f] if part == "down_proj" else t[f] for t in (old, new))
                torch.testing.assert_close(new, rounded(old[None], torch.tensor([bits_N[channel]]), 16)[0])
        for part in ("gate_proj", "down_proj"):
            old, new = (d[f"{layer}.shared_expert.{part}.weight"] for d in (before, after))
            old, new = (t[:, 5] if part == "down_proj" else t[5] for t in (old, new))
            torch.testing.assert_close(new, rounded(old[None], torch.tensor([bits_N[64 + 5]]), 16)[0])
        weighed, plain = errors[row][1], errors[row][0]
        assert 0 < weighed < plain < 0.5
    for name, tensor in before.items():
        if ".experts." not in name and ".shared_expert." not in name:
            assert torch.equal(after[name], tensor)
    with pytest.raises(InputError, match="pruned at --ratio 0.2"):
        quantize(path, replace(energies, ratio=0.2), tmp_path / "out", how)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((3, 2), (1.0,)), "names 2 groups and --shares 1"),
        (((9,), (1.0,)), "must lie from 1 to 8"),
        (((3, 2), (0.5, 0.6)), "sum to 1"),
        (((3, 2), (float("nan"), 0.6)), "sum to 1"),
    ],
)
def test_bits_that_cannot_be_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Bits(*arguments)

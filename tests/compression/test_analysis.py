# SPDX-License-Identifier: Apache-2.0
"""Energies equal a loop over tokens, under every fold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_moefold.compression.analysis import analyze
from lightning_moefold.compression.expert_pruning import score_experts
from lightning_moefold.compression.stream import CalibrationRows, Computing
from lightning_moefold.errors import InputError
from lightning_moefold.testing import RankPool, make_checkpoint
from tests.compression.jobs_analysis import energies_under
from tests.compression.naive import calibration_rows, naive_energies
from tests.quick import quick

EXACT = Computing(dtype=torch.float64, batch_size=3)


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal to 1e-9, and ranked the same wherever neighbours differ by more."""
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12 * max(1.0, expected.max(initial=0.0)))
    for one, other in zip(found.reshape(len(found), -1), expected.reshape(len(found), -1), strict=True):
        ordered = other[np.argsort(one, kind="stable")]
        assert (np.diff(ordered) >= -1e-9 * np.maximum(ordered[1:], ordered[:-1])).all()


@pytest.mark.parametrize(
    ("family", "ratio"),
    quick(
        [(family, ratio) for family in ("mixtral", "qwen2_moe", "qwen3_moe") for ratio in (None, 0.4)],
        ("mixtral", None),
        ("qwen2_moe", 0.4),
    ),
)
def test_energies_are_those_of_a_loop_over_tokens(tmp_path: Path, family: str, ratio: float | None) -> None:
    path, rows = make_checkpoint(tmp_path / "model", family), calibration_rows()
    found = analyze(path, rows, EXACT, ratio=ratio, alpha=0.9)
    routed, shared, _ = naive_energies(path, rows, 0.9, ratio)
    assert_same(found.energy, np.stack(routed))
    assert_same(found.shared_energy, np.stack(shared))
    assert found.layers.tolist() == ([0, 2] if family == "qwen3_moe" else [0, 1])
    assert (found.load.sum(1) == 2 * rows.tokens).all()  # top-2, without padding


SOME = ("| ep4", "tp2 cp2 | ep2 etp2", "pp2 | ep2")
OTHERS = ("| etp2 ep2", "| edp4", "tp2 | ep2", "tp4 | etp4", "cp4 | ep4")
"""dp is what remains."""


@pytest.mark.parametrize(
    ("family", "ratio", "folds"),
    quick(
        [("qwen2_moe", 0.4, SOME), ("qwen2_moe", 0.4, OTHERS), ("qwen2_moe", None, SOME), ("mixtral", 0.4, OTHERS)],
        ("qwen2_moe", 0.4, SOME),
    ),
)
def test_energies_are_the_same_under_every_fold(
    pool: RankPool, tmp_path: Path, family: str, ratio: float | None, folds: tuple[str, ...]
) -> None:
    """With uneven rows on data ranks, and padding."""
    path, rows = make_checkpoint(tmp_path / "model", family), calibration_rows(5)
    alone = analyze(path, rows, EXACT, ratio=ratio)
    for found in pool.run(energies_under, list(folds), str(path), rows, ratio=ratio, ranks=4):
        for energies in found:
            assert_same(energies.energy, alone.energy)
            assert_same(energies.shared_energy, alone.shared_energy)
            np.testing.assert_array_equal(energies.load, alone.load)


def test_an_interrupted_analysis_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, rows, draft = make_checkpoint(tmp_path / "model", "qwen3_moe"), calibration_rows(), tmp_path / "draft"

    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise Stop

    with pytest.raises(Stop):
        analyze(path, rows, EXACT, draft=draft, save_every=0, progress=stop)
    assert sorted(file.name for file in draft.iterdir()) == ["found-2.npz", "hidden-0of1-2.safetensors", "state.json"]
    seen: list[int] = []
    resumed = analyze(path, rows, EXACT, draft=draft, save_every=0, progress=lambda done, _: seen.append(done))
    assert seen == [3]
    assert not draft.exists()
    np.testing.assert_array_equal(resumed.energy, analyze(path, rows, EXACT).energy)
    with pytest.raises(Stop):
        analyze(path, rows, EXACT, draft=draft, save_every=0, progress=stop)
    seen.clear()
    analyze(path, rows, EXACT, draft=draft, alpha=0.5, progress=lambda done, _: seen.append(done))
    assert seen == [1, 2, 3]  # another analysis begins anew


def test_what_cannot_be_analysed_is_refused(tmp_path: Path) -> None:
    path, rows = make_checkpoint(tmp_path / "model", "mixtral"), calibration_rows()
    for ratio in (0.0, 1.0, float("nan"), -0.1):
        with pytest.raises(InputError, match="must lie between 0 and 1"):
            analyze(path, rows, EXACT, ratio=ratio)
    with pytest.raises(InputError, match="--alpha 2 must lie"):
        analyze(path, rows, EXACT, alpha=2)
    with pytest.raises(InputError, match="outside the vocabulary of 96"):
        analyze(path, CalibrationRows(torch.full((1, 4), 96)), EXACT)
    with pytest.raises(InputError, match="at least one row of two tokens"):
        CalibrationRows(torch.zeros(0, 8, dtype=torch.int64))
    tensors = load_file(path / "model.safetensors")
    name = next(name for name in tensors if name.startswith("model.layers.1.") and name.endswith("w2.weight"))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    for work in (analyze, score_experts):
        with pytest.raises(InputError, match="layer 1 computes NaN or infinite numbers in float64"):
            work(path, rows, EXACT)
    dense = make_checkpoint(tmp_path / "dense", "qwen3_moe", mlp_only_layers=[0, 1, 2])
    with pytest.raises(InputError, match="dense layers only"):
        analyze(dense, rows, EXACT)

# SPDX-License-Identifier: Apache-2.0
"""Pruned checkpoints, in Hugging Face's code, equal a model pruned by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_moefold import MoECausalLM
from lightning_moefold.compression.analysis import analyze
from lightning_moefold.compression.energies import Energies
from lightning_moefold.compression.pruning import prune
from lightning_moefold.compression.ranking import keep_by_layer, uniform_width
from lightning_moefold.errors import InputError
from lightning_moefold.testing import hf_reference, make_checkpoint
from tests.compression.naive import blocks_of, calibration_rows, matrices, naive_energies, shared_matrices
from tests.compression.test_analysis import EXACT
from tests.quick import quick

ROWS = calibration_rows()


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(ROWS.token_NS, attention_mask=ROWS.mask_NS).logits[ROWS.mask_NS.bool()]


def ours(path: Path) -> torch.Tensor:
    model = MoECausalLM.from_pretrained(path, torch.float64, router_aux_loss_coef=0.0).eval()
    with torch.no_grad():
        logits = model(ROWS.token_NS, attention_mask=ROWS.mask_NS).logits
    return logits[ROWS.mask_NS.bool()]


@pytest.mark.parametrize("family", quick(["mixtral", "qwen2_moe"], "qwen2_moe"))
def test_zeroed_is_the_model_pruned_by_hand(tmp_path: Path, family: str) -> None:
    path = make_checkpoint(tmp_path / "model", family)
    energies = analyze(path, ROWS, EXACT, ratio=0.4)
    pruned = prune(path, energies, tmp_path / "pruned", 0.4)
    _, _, by_hand = naive_energies(path, ROWS, 0.9, 0.4)
    torch.testing.assert_close(logits_of(hf_reference(tmp_path / "pruned")), logits_of(by_hand), rtol=0, atol=1e-12)
    torch.testing.assert_close(ours(tmp_path / "pruned"), logits_of(by_hand), rtol=0, atol=1e-10)
    for layer, kept in pruned.kept.items():
        model = hf_reference(tmp_path / "pruned")
        for expert in range(4):
            gate_FD, up_FD, down_DF = matrices(blocks_of(model)[layer], expert)
            for found in (gate_FD.any(1), up_FD.any(1), down_DF.any(0)):
                np.testing.assert_array_equal(found.numpy(), kept.routed_EF[expert])
        channels = 4 * 16 + (24 if family == "qwen2_moe" else 0)
        assert kept.routed_EF.sum() + kept.shared_S.sum() == channels - round(0.4 * channels)


@pytest.mark.parametrize("family", quick(["mixtral", "qwen2_moe"], "qwen2_moe"))
def test_uniform_is_a_smaller_model_with_the_same_function(tmp_path: Path, family: str) -> None:
    """Each expert's best channels: zeroing the others by hand changes nothing that cutting them out does not."""
    path = make_checkpoint(tmp_path / "model", family)
    energies = analyze(path, ROWS, EXACT)
    pruned = prune(path, energies, tmp_path / "pruned", 0.4, "uniform", multiple=4)
    by_hand = hf_reference(path)
    for row, (_, block) in enumerate(blocks_of(by_hand).items()):
        for expert in range(4):
            gone = np.argsort(energies.energy[row, expert])[:8]  # of 16: 8 is the multiple of 4 next to 9.6
            gate_FD, up_FD, down_DF = matrices(block, expert)
            gate_FD[gone], down_DF[:, gone] = 0, 0
        if (shared := shared_matrices(block)) is not None:
            shared[2][:, np.argsort(energies.shared_energy[row])[:8]] = 0  # of 24
    model = hf_reference(tmp_path / "pruned")
    torch.testing.assert_close(logits_of(model), logits_of(by_hand), rtol=0, atol=1e-11)
    torch.testing.assert_close(ours(tmp_path / "pruned"), logits_of(by_hand), rtol=0, atol=1e-10)
    if family == "mixtral":
        assert model.config.intermediate_size == 8
    else:
        assert (model.config.moe_intermediate_size, model.config.shared_expert_intermediate_size) == (8, 16)
    assert pruned.parameters[1] == sum(p.numel() for p in model.parameters())


def test_ties_go_by_expert_then_channel_and_the_shared_expert_last() -> None:
    kept = keep_by_layer(np.ones((2, 3)), np.ones(2), 0.5)
    assert kept.routed_EF.tolist() == [[False] * 3, [False, True, True]]
    assert kept.shared_S.tolist() == [True, True]
    kept = keep_by_layer(np.array([[1.0, 0, 2], [0, 3, 0]]), np.array([0.0, 9]), 0.375)
    assert kept.routed_EF.tolist() == [[True, False, True], [False, True, False]]
    assert kept.shared_S.tolist() == [True, True]
    assert keep_by_layer(np.arange(100.0)[None], np.zeros(0), 0.29).routed_EF.sum() == 71


def test_energies_survive_the_file(tmp_path: Path) -> None:
    energies = analyze(make_checkpoint(tmp_path / "model", "qwen2_moe"), ROWS, EXACT, ratio=0.2)
    energies.save(tmp_path / "e.npz")
    found = Energies.load_file(tmp_path / "e.npz")
    with np.load(tmp_path / "e.npz") as file:
        assert file["energy"].shape == (2, 4, 16)
        assert file["energy"].dtype == file["shared_energy"].dtype == np.float64
        assert file["shared_energy"].shape == (2, 24)
    for name, value in vars(energies).items():
        np.testing.assert_array_equal(getattr(found, name), value)


def test_what_cannot_be_pruned_is_refused(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model", "mixtral")
    energies = analyze(path, ROWS, EXACT, ratio=0.4)
    for ratio in (0.0, 1.0, float("nan")):
        with pytest.raises(InputError, match="must lie between 0 and 1"):
            prune(path, energies, tmp_path / "out", ratio)
    with pytest.raises(InputError, match="layers pruned at --ratio 0.4, so it cannot prune at 0.2"):
        prune(path, energies, tmp_path / "out", 0.2)
    with pytest.raises(InputError, match="goes with --form uniform only"):
        prune(path, energies, tmp_path / "out", 0.4, "zeroed", 64)
    with pytest.raises(InputError, match="16 as it is in multiples of 64; use a smaller --multiple"):
        prune(path, energies, tmp_path / "out", 0.4, "uniform", 64)
    with pytest.raises(InputError, match=r"leaves the expert width 128 as it is.*use a ratio near 0.5, or"):
        uniform_width(128, 0.1, 64)
    other = make_checkpoint(tmp_path / "other", "mixtral", seed=1)  # the same names and shapes, and other numbers
    with pytest.raises(InputError, match="are not those of"):
        prune(other, energies, tmp_path / "out", 0.4)
    with pytest.raises(InputError, match="does not exist"):
        Energies.load_file(tmp_path / "none.npz")
    (tmp_path / "bad.npz").write_bytes(b"PK nonsense")
    with pytest.raises(InputError, match="holds no energies"):
        Energies.load_file(tmp_path / "bad.npz")
    assert not (tmp_path / "out").exists()

# SPDX-License-Identifier: Apache-2.0
"""``moefold camera``, ``prune-experts`` and ``upcycle``, as a user types them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from demo_data import read_python_topics, train_tokenizer
from lightning_moefold import MoECausalLM, MoEConfig
from lightning_moefold.cli.main import main
from lightning_moefold.testing import make_checkpoint
from tests.compression.test_upcycling import dense_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds ``model/`` with its tokenizer, and ``a.txt``."""
    folder, text = tmp_path_factory.mktemp("compression"), read_python_topics()[:12_000]
    make_checkpoint(folder / "model", "qwen2_moe", vocab_size=320)
    train_tokenizer(text, 320).save_pretrained(folder / "model")
    (folder / "a.txt").write_text(text)
    return folder


def calibrate(folder: Path, *words: str) -> list[str]:
    return [
        "--checkpoint", str(folder / "model"), "--data", str(folder / "a.txt"), "--rows", "6", "--length", "32",
        "--cache-dir", str(folder / "tokens"), *words,
    ]  # fmt: skip


def analysed(folder: Path, name: str, *words: str) -> Path:
    path = folder / f"{name}.npz"
    assert main(["camera", "analyze", *calibrate(folder, "--dtype", "float64"), "--output", str(path), *words]) == 0
    return path


def test_analyse_prune_and_load(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    energies = analysed(folder, "e", "--plot", str(folder / "e.png"))
    said = capsys.readouterr().out
    assert "dense model; 192 tokens in 6 rows, alpha 0.9, float64, one process" in said
    assert "channels with 1% of energy" in said
    assert (folder / "e.png").read_bytes()[:4] == b"\x89PNG"
    prune = ["camera", "prune", "--checkpoint", str(folder / "model"), "--energies", str(energies), "--ratio", "0.4"]
    for form in ("zeroed", "uniform", "packed"):
        assert main([*prune, "--form", form, "--output", str(folder / form)]) == 0
        assert f"{form}\n" in capsys.readouterr().out
        assert (folder / form / "tokenizer.json").is_file()
        assert MoECausalLM.from_pretrained(folder / form, output_router_logits=True).config.num_experts == 4
    assert main(["camera", "unpack", "--checkpoint", str(folder / "packed"), "--output", str(folder / "unpacked")]) == 0
    ids = torch.arange(20).view(1, -1)
    zeroed, unpacked = (
        MoECausalLM.from_pretrained(folder / name, router_aux_loss_coef=0.0)(ids).logits
        for name in ("zeroed", "unpacked")
    )
    torch.testing.assert_close(unpacked, zeroed, rtol=1e-4, atol=1e-4)
    capsys.readouterr()
    quantize = ["camera", "quantize", *prune[2:6], "--bits", "8,4,2", "--shares", "0.1,0.3,0.6", "--block", "32"]
    assert main([*quantize, "--output", str(folder / "quantised")]) == 0
    assert "fake-quantised: 3.2 bits a weight of experts, 4.2 with scales" in capsys.readouterr().out


def test_prune_experts_and_upcycle(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = calibrate(folder, "--keep", "0.5", "--score", "msan", "--output", str(folder / "half"))
    assert main(["prune-experts", *words]) == 0
    assert "2 experts in each layer, chosen by msan" in capsys.readouterr().out
    assert MoEConfig.from_pretrained(folder / "half", output_router_logits=True).num_experts == 2
    dense_checkpoint(folder / "dense", "mistral")
    words = [
        "--checkpoint",
        str(folder / "dense"),
        "--output",
        str(folder / "moe"),
        "--top-k",
        "4",
        "--granularity",
        "2",
    ]
    assert main(["upcycle", *words]) == 0
    assert "mixtral with 8 experts of width 24, 4 for each token" in capsys.readouterr().out


def test_bad_input_is_one_sentence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--output", str(folder / "x.npz")]
    for words, message in (
        (["camera", "analyze", *calibrate(folder, "--ratio", "nan"), *out], "--ratio nan must lie between 0 and 1"),
        (["camera", "analyze", *calibrate(folder, "--length", "99999"), *out], "fewer than one row of 99999"),
        (["camera", "analyze", *calibrate(folder, "--rows", "0"), *out], "--rows 0 must be at least 1"),
        (["camera", "analyze", *calibrate(folder), "--output", "x"], "must end in .npz"),
        (["camera", "analyze", *calibrate(folder, "--fold", "| ep2"), *out], "expert_parallel_size=2"),
        (["camera", "analyze", *calibrate(folder, "--batch-size", "0"), *out], "must be at least 1"),
        (["camera", "analyze", *calibrate(folder, "--seed", "-1"), *out], "--seed -1 must be 0 or more"),
        (
            ["camera", "analyze", *calibrate(folder), "--output", str(folder / "a.txt" / "e.npz")],
            "energies cannot be saved",
        ),
        (["prune-experts", *calibrate(folder, "--keep", "0.5"), "--output", str(folder)], "is no part of a checkpoint"),
        (["prune-experts", *calibrate(folder, "--keep", "0.1"), *out], "use 0.5 or more"),
        (["prune-experts", *calibrate(folder, "--keep", "0.5", "--score", "x"), *out], "--score x is not known"),
        (["upcycle", "--checkpoint", str(folder / "model"), *out], "model_type='qwen2_moe' cannot be upcycled"),
    ):
        assert main(words) == 2, words
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
    assert not (folder / "x.npz").exists()


@pytest.mark.more
def test_ranks_are_started(folder: Path) -> None:
    alone = np.load(analysed(folder, "alone", "--ratio", "0.4"))
    spread = np.load(analysed(folder, "spread", "--ratio", "0.4", "--fold", "| ep2", "--ranks", "2"))
    np.testing.assert_allclose(spread["energy"], alone["energy"], rtol=1e-9, atol=1e-12)
    assert str(spread["fold"]) == "tp1 cp1 dp2 pp1 | etp1 ep2 edp1"
    assert not (folder / ".spread.npz.partial").exists()

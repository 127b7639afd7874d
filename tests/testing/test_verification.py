# SPDX-License-Identifier: Apache-2.0
"""``moefold verify``: finds a fold exact, and finds out where one is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_moefold.cli.main import main
from lightning_moefold.testing import make_checkpoint, verification


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("verify") / "model", "qwen2_moe")


def test_an_exact_fold(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["verify", "--checkpoint", str(checkpoint), "--fold", "tp2 | ep2", "--ranks", "2", "--layers", "1"]
    assert main([*command, "--num-microbatches", "2", "--recompute", "full"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("  ok  ") == 5
    assert "\nexact: errors below 1e-09" in printed


@pytest.mark.more
def test_a_wrong_gradient_is_named(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = verification.reference_run

    def wrong(*args: object, **kwargs: object) -> object:
        run = alone(*args, **kwargs)
        run.grads[1]["model.norm.weight"] *= 2
        return run

    monkeypatch.setattr(verification, "reference_run", wrong)
    assert main(["verify", "--checkpoint", str(checkpoint), "--fold", "", "--ranks", "1"]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "WRONG" in line]
    assert len(lines) == 1
    assert "gradients of step 1" in lines[0]
    assert "model.norm.weight" in lines[0]


def test_a_missing_gradient_is_no_match() -> None:
    finding = verification._tensors("gradients", {}, {"a": torch.ones(2)})
    assert not finding.holds


def test_what_cannot_be_verified(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--checkpoint", str(checkpoint), "--fold", "ep3", "--ranks", "2"]) == 2
    assert "does not divide" in capsys.readouterr().err
    assert main(["verify", "--checkpoint", str(checkpoint / "none"), "--fold", "", "--ranks", "1"]) == 2

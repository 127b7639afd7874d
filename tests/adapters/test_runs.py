# SPDX-License-Identifier: Apache-2.0
"""Runs that train an adapter: their checkpoints, resumed under another fold, and what is exported from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lightning_moefold.adapters import LoRA
from lightning_moefold.adapters.attach import is_adapter
from lightning_moefold.checkpoint.chunk_reader import StoredTensors
from lightning_moefold.cli.main import main
from lightning_moefold.errors import CheckpointError
from lightning_moefold.models.export import export
from lightning_moefold.testing import RankError, RankPool, assert_close_by_name, make_checkpoint
from lightning_moefold.testing.pieces import assemble
from tests.checkpoint import jobs_resume

ALL = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "shared_expert_gate",
    "gate",
    "experts",
]
THAWED = "model.norm.weight"


@pytest.mark.more
def test_a_run_with_an_adapter(pool: RankPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = str(make_checkpoint(tmp_path / "base", "qwen2_moe"))
    spec: dict[str, Any] = {"adapter": {"rank": 4, "expert_rank": 2, "targets": ALL}, "thawed": [THAWED]}
    full = pool.run(jobs_resume.save_and_go_on, base, "tp2 | etp2", spec, str(tmp_path), ranks=2)
    weights = assemble(report.weights for report in full)
    checkpoint = tmp_path / "step=3.ckpt"

    # It holds what trains, and names the rest.
    held = {n.removeprefix("model.model.") for n in StoredTensors(checkpoint, {}).items if n.startswith("model.")}
    assert held == {n for n in weights if is_adapter(n)} | {THAWED}
    resumed = pool.run(jobs_resume.resume, base, ["tp2 | etp2 ep2", "pp2 | ep2"], spec, str(checkpoint), ranks=4)
    for number in range(2):
        reports = [run[number] for run in resumed]
        assert reports[0].losses == pytest.approx(full[0].losses[3:], rel=1e-9)
        assert_close_by_name(assemble(r.weights for r in reports), weights, 1e-9, "weights")
        state = assemble(r.state for r in reports)
        assert_close_by_name(state, assemble(r.state for r in full), 1e-9, "state")
    moved = [n for n in weights if n.endswith("lora_B")]
    assert moved
    assert all(bool(weights[n].any()) for n in moved)

    # An export has the adapter in its weights.
    last = str(tmp_path / "step=10.ckpt")
    assert main(["export", "--checkpoint", last, "--output", str(tmp_path / "whole"), "--dtype", "float64"]) == 0
    assert "merged" in capsys.readouterr().out
    exported = load_file(tmp_path / "whole" / "model.safetensors")
    lora = LoRA(**spec["adapter"])
    q = "model.layers.1.self_attn.q_proj"
    expected = weights[f"{q}.weight"] + 8 * weights[f"{q}.lora_B"] @ weights[f"{q}.lora_A"]
    torch.testing.assert_close(exported[f"{q}.weight"], expected, rtol=1e-12, atol=1e-12)
    experts = "model.layers.0.mlp.experts"
    delta = weights[f"{experts}.up_lora_B"][3] @ weights[f"{experts}.gate_up_lora_A"][3]
    expected = weights[f"{experts}.up_proj"][3] + lora.scale(2) * delta
    torch.testing.assert_close(exported[f"{experts}.3.up_proj.weight"], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(exported[THAWED], weights[THAWED], rtol=0, atol=0)

    # Another base, another adapter, none: each in a sentence.
    other = str(make_checkpoint(tmp_path / "other", "qwen2_moe", vocab_size=96, max_position_embeddings=64))
    for path, changed, words in (
        (other, {}, "another base"),
        (base, {"adapter": {**spec["adapter"], "rank": 8}}, "make it as it was"),
        (base, {"adapter": None}, "holds an adapter"),
    ):
        wrong = {k: v for k, v in {**spec, **changed}.items() if v is not None}
        with pytest.raises(RankError) as caught:
            pool.run(jobs_resume.resume, path, ["tp2 | etp2"], wrong, str(checkpoint), ranks=2)
        assert all(words in message for message in caught.value.messages.values()), caught.value.messages
    with pytest.raises(CheckpointError, match="another model"):
        export(last, tmp_path / "wrong", Path(other))

# SPDX-License-Identifier: Apache-2.0
"""The table of sizes against the configuration's own arithmetic."""

from __future__ import annotations

import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from lightning_moefold import Fold, MoECausalLM
from lightning_moefold.callbacks import FoldSummary
from lightning_moefold.callbacks.summary import summarize_model
from lightning_moefold.testing import make_checkpoint


class Module(pl.LightningModule):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.model = MoECausalLM.from_pretrained(path)
        self.own = torch.nn.Linear(3, 4)
        self.model.model.embed_tokens.requires_grad_(False)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_sizes(tmp_path: Path, family: str) -> None:
    module = Module(make_checkpoint(tmp_path, family))
    config, summary = module.model.config, summarize_model(module, Fold(1))
    own, embedding = 16, config.vocab_size * config.hidden_size
    assert summary.total.total == config.num_parameters() + own
    assert summary.total.active == config.num_parameters(active=True) + own
    assert summary.total.trainable == summary.total.total - embedding
    assert summary.size_range() == (summary.total.total,) * 2
    groups = {name: size.total for name, size in summary.groups.items()}
    layers = config.num_moe_layers
    assert groups["embedding"] == groups["head"] == embedding
    assert groups["router"] == layers * config.num_experts * config.hidden_size
    assert groups["experts"] == groups["expert family"]
    assert groups["experts"] == layers * config.num_experts * 3 * config.hidden_size * config.moe_intermediate_size
    assert groups["other"] == own
    assert ("shared expert" in groups) == (family == "qwen2_moe")
    assert ("dense feed-forward" in groups) == (family == "qwen3_moe")
    kinds = sum(size for name, size in groups.items() if not name.endswith("family") and name != "total")
    assert kinds == groups["dense family"] + groups["expert family"] == groups["total"]


@pytest.mark.parametrize("rich", [True, False])
def test_it_is_printed_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, rich: bool
) -> None:
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setenv("COLUMNS", "160")
    module = Module(make_checkpoint(tmp_path, "mixtral"))
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", default_root_dir=tmp_path)
    FoldSummary().on_fit_start(trainer, module)
    printed = capsys.readouterr().out
    assert printed.count("tp1 cp1 dp1 pp1 | etp1 ep1 edp1") == 1
    for word in ("per rank", "experts", "dense family", "expert family", "total", "3.07 K"):
        assert word in printed

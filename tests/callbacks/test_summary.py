# SPDX-License-Identifier: Apache-2.0
"""The table of sizes against the configuration's own arithmetic."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import Logger

from lightning_moefold import Fold, MoECausalLM
from lightning_moefold.callbacks import FoldSummary
from lightning_moefold.callbacks.summary import summarize_model
from lightning_moefold.modules import GatedMLP, MoELayer
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


class OwnNetwork(torch.nn.Module):
    """Blocks under names of the user's own, among torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(10, 8)
        self.look = torch.nn.MultiheadAttention(8, 2)
        self.a = MoELayer(8, 4, 1, 6, shared_ffn_hidden_size=3)
        self.b = MoELayer(8, 2, 2, expert=lambda: torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 8)))
        self.thin, self.scale, self.out = GatedMLP(8, 7), torch.nn.LayerNorm(8), torch.nn.Linear(8, 10)


def test_a_network_of_the_users_own() -> None:
    summary = summarize_model(OwnNetwork(), Fold(2))
    sizes = {name: (size.total, size.active) for name, size in summary.groups.items()}
    own = 16 + 72
    experts, active = 4 * 3 * 8 * 6 + 2 * own, 3 * 8 * 6 + 2 * own
    dense = 80 + 8 * 24 + 24 + 8 * 8 + 8 + 48 + 3 * 8 * 3 + 8 + 3 * 8 * 7 + 16 + 90
    assert sizes == {
        "embedding": (80, 80),
        "attention": (8 * 24 + 24 + 8 * 8 + 8,) * 2,
        "router": (8 * 4 + 8 * 2,) * 2,
        "experts": (experts, active),
        "shared expert": (3 * 8 * 3 + 8,) * 2,
        "dense feed-forward": (3 * 8 * 7,) * 2,
        "norms": (16, 16),
        "other": (90, 90),
        "dense family": (dense, dense),
        "expert family": (experts, active),
        "total": (dense + experts, dense + active),
    }
    assert summary.size_range() == (dense + experts,) * 2


def test_memory_by_optimizer() -> None:
    network = OwnNetwork().bfloat16()
    network.out.requires_grad_(False)
    summary, parameters = summarize_model(network, Fold(1)), list(network.parameters())
    weights, gradients = (2 * sum(p.numel() for p in parameters if p.requires_grad or all_) for all_ in (True, False))
    for optimizer, states in (
        (torch.optim.AdamW(parameters), {"Adam states": (2 * gradients,) * 2}),
        (torch.optim.AdamW(parameters, amsgrad=True), {"Adam states": (3 * gradients,) * 2}),
        (torch.optim.SGD(parameters), {"SGD states": (0, 0)}),
        (torch.optim.SGD(parameters, momentum=0.9), {"SGD states": (gradients,) * 2}),
        (torch.optim.Adafactor(parameters), {}),
        (None, {}),
    ):
        together = weights + gradients + sum(low for low, _ in states.values())
        expected = {"weights": (weights,) * 2, "gradients": (gradients,) * 2, **states, "together": (together,) * 2}
        assert summary.memory(optimizer) == expected


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
    for word in (
        "kept by each rank: weights",
        "per rank",
        "experts",
        "dense family",
        "expert family",
        "total",
        "3.07 K",
    ):
        assert word in printed


def test_a_logger_that_refuses_the_fold_stops_no_run(tmp_path: Path) -> None:
    """MLflow does, of a run that goes on under another fold; on the first rank alone."""
    refusing, taking = mock.Mock(spec=Logger), mock.Mock(spec=Logger)
    refusing.log_hyperparams.side_effect = RuntimeError("Changing param values is not allowed")
    trainer = pl.Trainer(
        logger=[refusing, taking], enable_checkpointing=False, accelerator="cpu", default_root_dir=tmp_path
    )
    with pytest.warns(UserWarning, match=r"did not take the fold .* \(Changing param values is not allowed\)"):
        FoldSummary().on_fit_start(trainer, torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    taking.log_hyperparams.assert_called_once()

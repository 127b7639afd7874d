# SPDX-License-Identifier: Apache-2.0
"""Tables of expert loads without ranks: user-made networks, layers without load, pictures, history."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import WandbLogger

from lightning_moefold.balance.placement import Placement
from lightning_moefold.callbacks.common import LogSchedule
from lightning_moefold.callbacks.expert_load import ExpertLoad, LoadHistory, LoadReader, LoadRow
from lightning_moefold.callbacks.load_balance import LoadBalanceMonitor, load_figures
from lightning_moefold.callbacks.load_images import LoadImages
from lightning_moefold.dispatch import DispatchConfig
from lightning_moefold.modules import MoELayer
from lightning_moefold.plots.files import NO_EXPERT
from lightning_moefold.plots.style import fair_shares


class TwoLayers(pl.LightningModule):
    """A network of the user's own, with layers of 4 and 2 experts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = MoELayer(8, 4, 2, 8), MoELayer(8, 2, 1, 8)

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        return self.second(self.first(batch)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def load(*counts: list[int]) -> ExpertLoad:
    rows = [LoadRow(i, f"blocks.{i}", len(counts_E), None) for i, counts_E in enumerate(counts)]
    width = max(map(len, counts))
    table = np.array([counts_E + [NO_EXPERT] * (width - len(counts_E)) for counts_E in counts])
    return ExpertLoad(rows, table, np.zeros_like(table), np.array([[sum(c)] for c in counts]))


def test_layers_without_load_are_left_out() -> None:
    figures = load_figures(load([3, 1], [0, 0]))
    assert figures["moe/layer_0/max_over_mean"] == figures["moe/load_imbalance"] == 1.5
    assert not any(name.startswith("moe/layer_1") for name in figures)
    assert all(np.isfinite(value) for value in figures.values())
    assert load_figures(load([0, 0])) == {}


def test_dropped_choices_are_a_share_of_all() -> None:
    even = load([3, 1], [4, 0])
    assert load_figures(even)["moe/dropped_frac"] == 0
    assert load_figures(replace(even, dropped_LE=np.array([[1, 0], [0, 0]])))["moe/dropped_frac"] == 1 / 8


def test_counters_are_no_state_of_the_model() -> None:
    layer = MoELayer(8, 4, 2, 8)
    layer(torch.randn(3, 8))
    assert layer.load_E.sum() == 6
    assert not list(layer.buffers())  # DDP and the strategy would give every rank the first one's
    assert not any("load" in name for name in layer.state_dict())
    layer.double()
    assert layer.load_E.dtype is torch.int64
    with torch.device("meta"):
        late = MoELayer(8, 4, 2, 8)
    assert late.to_empty(device="cpu").load_E.tolist() == [0] * 4


def test_a_network_of_the_users_own_under_a_plain_strategy(tmp_path: Path) -> None:
    monitor = LoadBalanceMonitor(log_every_n_steps=1)
    trainer = pl.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[monitor],
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(TwoLayers(), torch.utils.data.DataLoader(torch.randn(6, 8), batch_size=3))
    assert [counts.sum(1, where=counts >= 0).tolist() for _, counts in monitor.history] == [[6, 3], [6, 3]]
    assert all((counts[1, 2:] == NO_EXPERT).all() for _, counts in monitor.history)
    assert "moe/layer_1/entropy" in trainer.logged_metrics
    assert trainer.logged_metrics["moe/rank_load_max_over_mean"] == 1


def test_a_reading_begins_where_the_last_one_ended() -> None:
    module = TwoLayers()
    trainer: Any = SimpleNamespace(
        world_size=1, global_rank=0, strategy=SimpleNamespace(root_device=torch.device("cpu"))
    )
    reader, other = LoadReader(trainer, module), LoadReader(trainer, module)
    module.first.load_E += torch.tensor([1, 2, 3, 4])
    module.second.load_E[1] += 7
    module.second.dropped_E[1] += 5
    load = reader.read()
    assert load.counts_LE.tolist() == [[1, 2, 3, 4], [0, 7, NO_EXPERT, NO_EXPERT]]
    assert load.dropped_LE.tolist() == [[0, 0, 0, 0], [0, 5, 0, 0]]
    assert load.rank_rows_LR.tolist() == [[10], [2]]
    assert not reader.read().dropped_LE.any()
    assert reader.read().counts_LE.sum(1).tolist() == [0, 2 * NO_EXPERT]
    assert other.read().rank_rows_LR.tolist() == [[10], [2]]


def test_rows_of_ranks_are_those_of_the_placement_at_their_time() -> None:
    layer = MoELayer(8, 4, 2, 8)
    layer.placement = Placement.contiguous(4, 2)
    layer.load_E += torch.tensor([1, 2, 4, 8])
    assert layer.part_rows().tolist() == [3, 12]
    layer.place(Placement((0, 2, 1, 3), 2))
    assert layer.part_rows().tolist() == [3, 12]
    layer.load_E += torch.tensor([1, 2, 4, 8])
    assert layer.part_rows().tolist() == [3 + 5, 12 + 10]
    layer.place(Placement((3, 2, 1, 0), 2))
    layer.load_E += torch.tensor([1, 2, 4, 8])
    assert layer.part_rows().tolist() == [3 + 5 + 12, 12 + 10 + 3]
    layer.reset_load()
    assert layer.part_rows().tolist() == [0, 0]


def test_a_rank_has_not_computed_what_was_dropped() -> None:
    """By a layer with a capacity of its own, against the counts of choices that were served."""
    torch.manual_seed(0)
    layer = MoELayer(8, 4, 2, 8, dispatch=DispatchConfig(capacity_factor=0.5))
    served = []
    compute = layer._served
    layer._served = lambda *given: (served.append((given[0], compute(*given)[0])), compute(*given))[1]  # type: ignore[method-assign, func-returns-value]
    layer(torch.randn(2, 20, 8))
    [(expert_TK, kept_TK)] = served
    assert layer.load_E.sum() == 80
    assert layer.dropped == 80 - kept_TK.sum() > 0
    assert torch.equal(layer.load_E - layer.dropped_E, torch.bincount(expert_TK[kept_TK], minlength=4))
    assert layer.part_rows().tolist() == [int(kept_TK.sum())]
    figures = ExpertLoad(
        [LoadRow(0, "", 4, layer)], layer.load_E[None].numpy(), layer.dropped_E[None].numpy(), np.zeros((1, 1))
    )
    assert figures.served_by_layer()[0].sum() == int(kept_TK.sum())


def test_missing_packages_cost_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    trainer: Any = SimpleNamespace(
        loggers=[object.__new__(WandbLogger)],
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=0)),
    )
    images = LoadImages()
    with pytest.warns(UserWarning, match="continues without pictures"):
        images.log(trainer, load([1, 2]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images.log(trainer, load([1, 2]))


def test_fair_shares() -> None:
    found = fair_shares(load([3, 1, 2], [4, 4], [0, 0, 0]).counts_LE)
    np.testing.assert_equal(found, [[1.5, 0.5, 1], [1, 1, np.nan], [np.nan] * 3])


def test_history_goes_on_from_where_a_fit_starts(tmp_path: Path) -> None:
    history = LoadHistory()
    history.begin([0, 2], 0)
    history.entries += [(step, np.full((2, 3), step)) for step in (10, 20, 30)]
    history.begin([0, 2], 20)  # resumed from an earlier step: what came after it is made again
    history.save(tmp_path / "new" / "load.npz")
    saved = np.load(tmp_path / "new" / "load.npz")
    assert saved["steps"].tolist() == [10, 20]
    assert saved["counts"].shape == (2, 2, 3)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["load.npz"]
    history.begin([0, 1], 20)
    assert history.entries == []


def test_a_monitor_that_logs_nothing_says_why() -> None:
    trainer: Any = SimpleNamespace(global_step=3, barebones=False, fast_dev_run=False, log_every_n_steps=10)
    for schedule, every in ((LogSchedule(50), 50), (LogSchedule(None), 10)):
        trainer.global_step = 3
        schedule.start(trainer)
        trainer.global_step = 11
        with pytest.warns(
            UserWarning, match=f"LoadBalanceMonitor has logged nothing: it logs every {every} .* made 8; lower"
        ):
            schedule.explain_silence(trainer, LoadBalanceMonitor())
    with warnings.catch_warnings():  # nobody expects figures of no step, or of a run that is to do nothing else
        warnings.simplefilter("error")
        for quiet in ({"global_step": 3}, {"barebones": True}, {"fast_dev_run": 1}):
            schedule.explain_silence(SimpleNamespace(**{**vars(trainer), **quiet}), LoadBalanceMonitor())

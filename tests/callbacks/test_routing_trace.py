# SPDX-License-Identifier: Apache-2.0
"""RoutingTraceRecorder in real runs: what it writes is what the routers chose, under every fold and beside other readers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_moefold import Fold, MoEFoldStrategy
from lightning_moefold.balance.trace import read_trace
from lightning_moefold.callbacks import LoadBalanceMonitor, RoutingTraceRecorder
from lightning_moefold.callbacks.expert_load import LoadRow
from lightning_moefold.errors import InputError
from lightning_moefold.modules import MoELayer
from lightning_moefold.testing import PoolEnvironment, RankPool, join_rows, make_batches, make_checkpoint
from tests.exactness.runs import BatchList, Case, RankRun

MODEL = {"num_experts": 8, "num_hidden_layers": 2}
STEPS, PARTS, LENGTH = 4, 4, 10


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), "qwen2_moe", **MODEL)


def recorded_fit(path: str, fold: str, root: str, spec: dict[str, Any]) -> tuple[int, Any]:
    """Trains with a recorder and, before it in the list, a monitor that resets the counters; returns the records' number."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if world > 1 else 0
    parsed = Fold.parse(fold, world)
    batches = make_batches(STEPS * spec.get("accumulate", 1), PARTS, 1, LENGTH, 96, padding="right")
    share = PARTS // parsed.dp
    first = parsed.coordinates(rank)["dp"] * share
    recorder = RoutingTraceRecorder(every_n_steps=spec.get("every", 1), path=f"{root}/trace.npz")
    saver = ModelCheckpoint(root, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    trainer = pl.Trainer(
        accelerator="cpu", devices=world, plugins=[PoolEnvironment()] if world > 1 else [], logger=False, max_epochs=1,
        strategy=MoEFoldStrategy(fold=fold, num_microbatches=2 if parsed.pp > 1 else None),
        callbacks=[LoadBalanceMonitor(1), recorder, *([saver] if "save" in spec else [])],
        accumulate_grad_batches=spec.get("accumulate", 1), max_steps=spec.get("steps", -1),
        use_distributed_sampler=False, enable_checkpointing="save" in spec, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = Case(path, RankRun(), {"root": root, "lr": 0.0, "optimizer": "sgd"})
    loader = DataLoader(BatchList([join_rows(step[first : first + share]) for step in batches]), batch_size=None)
    trainer.fit(module, loader, ckpt_path=spec.get("resume"))
    return len(recorder.records)


@pytest.mark.more
def test_every_fold_records_the_same_choices(pool: RankPool, checkpoint: Path, tmp_path: Path) -> None:
    recorded_fit(str(checkpoint), "", str(tmp_path / "one"), {})
    one = read_trace(tmp_path / "one" / "trace.npz")
    assert one.iterations_N.tolist() == [1, 2, 3, 4]
    assert one.counts_NLSE.shape == (4, 2, 1, 8)
    assert (one.hidden_size, one.expert_width) is not None
    rows = make_batches(STEPS, PARTS, 1, LENGTH, 96, padding="right")
    tokens = [int(sum(part["attention_mask"].sum() for part in step)) for step in rows]
    assert one.counts_NLSE.sum((2, 3)).tolist() == [[2 * n] * 2 for n in tokens]  # top-2, padding left out
    for fold, sources in (("tp2 | ep4", 4), ("tp2 pp2 | ep2", 2)):
        folder = tmp_path / fold.replace(" ", "")
        records = pool.run(recorded_fit, str(checkpoint), fold, str(folder), {}, ranks=4)
        assert records == [4, 0, 0, 0]
        trace = read_trace(folder / "trace.npz")
        assert trace.counts_NLSE.shape == (4, 2, sources, 8)
        assert (trace.counts_NLSE.sum(2) == one.counts_NLSE.sum(2)).all()
        assert (trace.counts_NLSE.sum(3) > 0).all()
        assert (trace.hidden_size, trace.expert_width) == (one.hidden_size, one.expert_width)


def test_accumulated_batches_and_a_resumed_run(checkpoint: Path, tmp_path: Path) -> None:
    recorded_fit(str(checkpoint), "", str(tmp_path / "whole"), {"accumulate": 2})
    whole = read_trace(tmp_path / "whole" / "trace.npz")
    assert whole.iterations_N.tolist() == [1, 2, 3, 4]
    batches = make_batches(8, PARTS, 1, LENGTH, 96, padding="right")
    tokens = [int(sum(part["attention_mask"].sum() for part in step)) for step in batches]
    assert whole.counts_NLSE[:, 0].sum((1, 2)).tolist() == [
        2 * (a + b) for a, b in zip(tokens[::2], tokens[1::2], strict=True)
    ]
    recorded_fit(str(checkpoint), "", str(tmp_path / "first"), {"accumulate": 2, "save": True, "steps": 3})
    (saved,) = (path for path in (tmp_path / "first").iterdir() if "step=2" in path.name)
    assert read_trace(tmp_path / "first" / "trace.npz").iterations_N.tolist() == [1, 2, 3]
    recorded_fit(str(checkpoint), "", str(tmp_path / "second"), {"accumulate": 2, "resume": str(saved)})
    second = read_trace(tmp_path / "second" / "trace.npz")
    assert second.iterations_N.tolist() == [1, 2, 3, 4]
    assert (second.counts_NLSE[:2] == whole.counts_NLSE[:2]).all()  # of the run that was resumed
    # This loader has no state, so the resumed run reads the first batches once more.
    assert (second.counts_NLSE[2:].sum((2, 3)) == whole.counts_NLSE[:2].sum((2, 3))).all()


def test_only_the_steps_asked_for(checkpoint: Path, tmp_path: Path) -> None:
    assert recorded_fit(str(checkpoint), "", str(tmp_path), {"every": 3}) == 1
    trace = read_trace(tmp_path / "trace.npz")
    assert trace.iterations_N.tolist() == [3]
    with np.load(tmp_path / "trace.npz") as saved:
        assert saved["counts"].dtype == np.uint8


def test_a_step_that_is_taken_back_counts_nothing(tmp_path: Path) -> None:
    """As NonFiniteGuard does after backward."""
    recorder, layer = RoutingTraceRecorder(path=tmp_path / "a.npz"), MoELayer(8, 4, 2, 8)
    layer.load_E += 5
    recorder._rows = [LoadRow(0, "layer", 4, layer)]
    recorder._seen, recorder._step = [layer.load_E.clone()], [torch.zeros(4, dtype=torch.int64)]
    layer.load_E += torch.tensor([1, 2, 3, 4])
    recorder._count()
    assert recorder._step[0].tolist() == [1, 2, 3, 4]
    layer.load_E -= torch.tensor([1, 2, 3, 4])
    recorder._count()
    assert not recorder._step[0].any()


def test_a_trace_in_a_store_goes_on(checkpoint: Path, tmp_path: Path) -> None:
    """And a dry run, which writes nothing, needs no path."""
    recorded_fit(str(checkpoint), "", str(tmp_path), {})
    place = f"memory://{tmp_path.name}/trace.npz"
    with fsspec.open(place, "wb") as file:
        file.write((tmp_path / "trace.npz").read_bytes())
    recorder = RoutingTraceRecorder(path=place)
    recorder.load_state_dict({"path": place})
    recorder._rows, recorder._sources = [LoadRow(i, "", 8, None) for i in range(2)], 1
    assert [step for step, _ in recorder._earlier(3)] == [1, 2, 3]
    trainer = pl.Trainer(
        accelerator="cpu", strategy=MoEFoldStrategy(), callbacks=[RoutingTraceRecorder()], fast_dev_run=True,
        use_distributed_sampler=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    batches = make_batches(1, 1, 2, LENGTH, 96)[0]
    trainer.fit(
        Case(str(checkpoint), RankRun(), {"root": "", "lr": 0.0, "optimizer": "sgd"}),
        DataLoader(BatchList(batches), batch_size=None),
    )


class _Plain(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        return self.linear(batch).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must end in \.npz"):
        RoutingTraceRecorder(path="trace.json")
    with pytest.raises(InputError, match="every_n_steps=0 of RoutingTraceRecorder must be at least 1"):
        RoutingTraceRecorder(0)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=1, logger=False, use_distributed_sampler=False, enable_checkpointing=False,
        enable_progress_bar=False, callbacks=[RoutingTraceRecorder(path=tmp_path / "a.npz")],
    )  # fmt: skip
    with pytest.raises(InputError, match="RoutingTraceRecorder found no MoELayer"):
        trainer.fit(_Plain(), DataLoader(torch.zeros(2, 2)))

# SPDX-License-Identifier: Apache-2.0
"""Tokens and model FLOPs of batches, the stopwatch, and figures from rows of numbers."""

from __future__ import annotations

import math
from dataclasses import astuple
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_moefold import MoECausalLM
from lightning_moefold.callbacks import MFUMonitor
from lightning_moefold.callbacks.memory import read_memory
from lightning_moefold.callbacks.mfu import summarize
from lightning_moefold.callbacks.stopwatch import HostClock, Stopwatch
from lightning_moefold.callbacks.work import WorkModel

CONFIG = {
    "model_type": "mixtral", "vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "intermediate_size": 12, "num_local_experts": 4, "num_experts_per_tok": 2,
    "sliding_window": None, "router_aux_loss_coef": 0.0,
}  # fmt: skip
IDS = torch.zeros(3, 6, dtype=torch.int64)
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1]])


class WithModel(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = MoECausalLM.from_config(CONFIG)


def counted(work: WorkModel, batch: Any) -> tuple[float, float, float]:
    return astuple(work.count([work.read(batch)]))


def by_hand(length: int) -> float:
    """Model FLOPs of one row: 3 x 2 per weight a token meets, plus scores and values of each causal pair."""
    weights = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 8 * 4 + 2 * 3 * 8 * 12) + 50 * 8
    pairs = length * (length + 1) / 2
    return 3 * (2 * weights * length + 2 * 2 * 2 * 8 * pairs)


def test_flops_by_hand() -> None:
    work = WorkModel(WithModel(), None, False)
    assert counted(work, {"input_ids": IDS}) == (18, pytest.approx(3 * by_hand(6)), pytest.approx(3 * by_hand(6)))


@pytest.mark.parametrize(("count_padding", "tokens", "rows"), [(False, 10, (6, 2, 2)), (True, 18, (6, 6, 6))])
def test_padding(count_padding: bool, tokens: int, rows: tuple[int, ...]) -> None:
    work = WorkModel(WithModel(), None, count_padding)
    flops = sum(by_hand(length) for length in rows)
    assert counted(work, {"input_ids": IDS, "attention_mask": MASK})[:2] == (tokens, pytest.approx(flops))


def test_other_modules() -> None:
    module = pl.LightningModule()
    unknown = [math.isnan(x) for x in counted(WorkModel(module, None, False), {"input_ids": IDS})]
    assert unknown == [False, True, True]
    assert all(math.isnan(x) for x in counted(WorkModel(module, None, False), IDS))
    assert counted(WorkModel(module, lambda batch: (len(batch), 4), False), IDS)[0] == 12
    module.flops_per_token = 5.0
    assert counted(WorkModel(module, None, False), {"input_ids": IDS}) == (18, 90, 90)
    module.flops_per_token = lambda length: 2.0 * length
    assert counted(WorkModel(module, None, False), {"input_ids": IDS}) == (18, 18 * 12, 18 * 12)
    module.flops_per_batch = 7
    assert counted(WorkModel(module, None, False), {"input_ids": IDS}) == (18, 7, 7)
    tokens, flops, _ = counted(WorkModel(module, None, False), IDS)
    assert math.isnan(tokens)
    assert flops == 7


def test_stopwatch_leaves_out_pauses() -> None:
    now = [0.0]
    watch = Stopwatch(HostClock(lambda: now[0]))

    def passes(seconds: float) -> None:
        now[0] += seconds

    def lap() -> float:
        return watch.clock.seconds(watch.lap())

    passes(5)
    watch.resume()
    passes(1)
    assert lap() == 1
    passes(2)
    watch.pause()
    watch.pause()
    passes(50)
    watch.resume()
    watch.resume()
    passes(4)
    assert lap() == 6
    passes(9)
    watch.skip()
    passes(3)
    assert lap() == 3
    watch.pause()
    passes(7)
    assert lap() == 0


def test_figures_of_rows() -> None:
    # two ranks that share a batch of 100 tokens and 4e12 FLOPs; the slower one took 2 s for 4 steps
    table_WK = torch.tensor(
        [[1.5, 100, 4e12, 4e12, 2e9, 6e9, 3e9], [2.0, 100, 4e12, 4e12, 1e9, 7e9, 5e9]], dtype=torch.float64
    )
    found = summarize(table_WK, data_share=0.5, steps=4, peak=10e12)
    assert found == {
        "train/mfu": 0.2,
        "train/tokens_per_second": 50,
        "train/tokens_per_second_per_device": 25,
        "train/tflops_per_device": 1,
        "train/step_time": 0.5,
        "train/memory_allocated_gb": 2,
        "train/memory_reserved_gb": 7,
        "train/memory_peak_gb": 5,
    }
    table_WK[:, 3] = 3e12  # work that frozen parameters save
    assert summarize(table_WK, data_share=0.5, steps=4, peak=10e12) == {**found, "train/hfu": pytest.approx(0.15)}
    nan = float("nan")
    assert "train/mfu" not in summarize(table_WK, 0.5, 4, nan)
    table_WK[1, 1:4] = nan
    table_WK[1, 5] = nan
    assert set(summarize(table_WK, 0.5, 4, 1e12)) == {
        "train/step_time", "train/memory_allocated_gb", "train/memory_peak_gb"
    }  # fmt: skip


def test_memory_of_this_process() -> None:
    before = read_memory(torch.device("cpu"))
    block = torch.ones(30_000_000)  # 120 MB
    after = read_memory(torch.device("cpu"))
    assert after.peak >= block.nbytes
    assert math.isnan(after.reserved)
    if not math.isnan(before.allocated):  # Linux
        assert after.peak >= after.allocated >= before.allocated + 0.9 * block.nbytes


def test_arguments() -> None:
    for wrong in ({"window": 0}, {"warmup_steps": -1}, {"peak_flops": 0.0}, {"log_every_n_steps": 0}):
        with pytest.raises(ValueError, match="must be"):
            MFUMonitor(**wrong)  # type: ignore[arg-type]

# SPDX-License-Identifier: Apache-2.0
"""Attention over cp in the planner: the exchange that a run takes, and what of it computation hides."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch

from lightning_moefold.mesh import Axis
from lightning_moefold.modules.attention import context
from lightning_moefold.modules.attention.layout import ContextLayout
from lightning_moefold.modules.sequence import SequenceBatch
from lightning_moefold.planner.cost.layer import LayerCosts
from lightning_moefold.planner.machine.hardware import PRESETS, Hardware
from lightning_moefold.planner.search.job import Job
from lightning_moefold.planner.search.models_zoo import MODELS

LENGTH, CP = 32768, 4


def _costs(window: int | None = None, **changes: object) -> LayerCosts:
    layers = MODELS["mixtral-8x22b"].num_hidden_layers
    model = replace(MODELS["mixtral-8x22b"], sliding_windows=(window,) * layers)
    job = Job(model, 32, PRESETS["dgx-h100"], 32, LENGTH)
    return LayerCosts(replace(job, **changes))  # type: ignore[arg-type]


def _exchange_of_a_run(window: int | None, dtype: torch.dtype, device: str, head_size: int) -> str:
    """What ``context_attention`` gives to attention, on tensors without data."""
    layout = ContextLayout(LENGTH, Axis("cp", tuple(range(CP))))
    q, k = (torch.empty(1, heads, LENGTH // CP, head_size, dtype=dtype, device="meta") for heads in (48, 8))
    takes = mock.patch.object(context, "takes_runs", return_value=device == "cuda" and dtype == torch.bfloat16)
    batch = SequenceBatch(1, LENGTH, cp=layout.cp)
    with takes, mock.patch.object(context.AttentionByHeads, "apply") as apply:
        context.context_attention(q, k, k, layout, batch.visibility(window), "auto")
    exchange, runs = apply.call_args.args[5:]
    return exchange if runs is None else "all_gather"


@pytest.mark.parametrize("window", [None, 4096, LENGTH])
@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.bfloat16), ("32-true", torch.float32)])
@pytest.mark.parametrize("machine", ["dgx-h100", "cpu"])
def test_the_exchange_is_that_of_a_run(machine: str, precision: str, dtype: torch.dtype, window: int | None) -> None:
    hardware: Hardware = replace(PRESETS["dgx-h100"], device="cuda" if machine == "dgx-h100" else "cpu")
    costs = _costs(window, hardware=hardware, precision=precision)
    found = costs.context_exchange(1, CP, 1, window)
    assert found == _exchange_of_a_run(window, dtype, hardware.device, costs.model.head_dim)
    assert found == ("all_gather" if (window, precision, machine) == (4096, "bf16-mixed", "dgx-h100") else "ring")


def test_gathered_keys_hide_behind_the_attention_of_other_heads() -> None:
    """Of eight groups, the first is exposed, and of each other what attention leaves; the more the less attention there is."""
    costs = _costs(4096)
    group = costs.shape(CP, 1)
    pair = 2 * LENGTH // CP * 8 * costs.model.head_dim * 2
    whole = costs.links.gather(group, group.size * pair)
    one, back = costs._meet("all_gather", group, 0.0, pair, 1, 1.0, 1.0)
    assert one == pytest.approx(whole)
    assert back > 2 * one  # keys again, and gradients of twice the width
    lost = 1 - costs.job.hardware.kernels.overlap
    of_eight = costs.links.gather(group, group.size * pair / 8)
    there, back = costs._meet("all_gather", group, 0.0, pair, 8, 1.0, 1.0)
    assert there == pytest.approx(of_eight * (1 + 7 * lost))
    idle, idle_back = costs._meet("all_gather", group, 0.0, pair, 8, 0.0, 0.0)
    assert idle == pytest.approx(8 * of_eight)
    assert back == pytest.approx(idle_back / 8 * (1 + 7 * lost))


def test_a_ring_hides_all_but_gradients_last_step_home() -> None:
    costs = _costs()
    perfect = replace(costs.job.hardware.kernels, overlap=1.0)
    costs = _costs(hardware=replace(costs.job.hardware, kernels=perfect))
    group, pair = costs.shape(CP, 1), 1e8
    assert costs._meet("ring", group, 0.0, pair, 4, 1.0, 1.0) == (
        0.0, pytest.approx(4 * costs.links.neighbour(group, 2 * pair / 4))
    )  # fmt: skip
    there, back = costs._meet("ring", group, 0.0, pair, 4, 0.0, 0.0)
    assert there == pytest.approx(4 * (CP - 1) * costs.links.neighbour(group, pair / 4))
    home = costs.links.neighbour(group, 2 * pair / 4)
    assert back == pytest.approx(4 * ((CP - 1) * costs.links.neighbour(group, 3 * pair / 4) + home))


def test_layers_with_and_without_a_window_are_averaged() -> None:
    model = MODELS["mixtral-8x22b"]
    half = model.num_hidden_layers // 2
    mixed = replace(model, sliding_windows=(None, 4096) * half)
    job = Job(model, 32, PRESETS["dgx-h100"], 32, LENGTH)
    blocks = [
        LayerCosts(replace(job, model=m)).attention(2, CP, 1)
        for m in (
            mixed,
            replace(model, sliding_windows=(None,) * 2 * half),
            replace(model, sliding_windows=(4096,) * 2 * half),
        )
    ]
    for name in ("attention", "cp"):
        both, full, narrow = (block.forward[name] for block in blocks)
        assert both == pytest.approx((full + narrow) / 2)
        assert full != narrow

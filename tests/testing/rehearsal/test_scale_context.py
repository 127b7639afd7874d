# SPDX-License-Identifier: Apache-2.0
"""One rank of many under context parallelism: attention sends what each exchange requires, and mistakes would show."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lightning_moefold.mesh import Axis
from lightning_moefold.modules.attention import head_groups
from lightning_moefold.modules.attention.exchanges import Exchange
from lightning_moefold.modules.recompute_parts import Recompute
from lightning_moefold.parallel import PipelinePlan
from lightning_moefold.planner.search.models_zoo import MODELS
from lightning_moefold.testing.rehearsal.scale import Step
from tests.quick import quick
from tests.testing.rehearsal.rehearsing import SMALL, check, differences


@pytest.mark.parametrize(
    ("fold", "exchange", "recompute"),
    quick(
        [("tp2 cp2 pp2 | ep4 etp2", "ring", None), ("tp2 cp4 | ep4 etp2", "all_gather", "full"),
         ("cp2 | ep4", "all_to_all", "selective"), ("tp2 cp2 | ep4 etp2", "ring", ["norm", "expert_activation"])],
        ("tp2 cp4 | ep4 etp2", "all_gather", "full"),
    ),
)  # fmt: skip
def test_exchanges(fold: str, exchange: Exchange, recompute: Recompute | None) -> None:
    check(Step(SMALL, 2, 8192, PipelinePlan(), exchange, recompute), fold, 32, 13)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [None, "selective", "full"])
@pytest.mark.parametrize("exchange", ["auto", "ring", "all_gather", "all_to_all"])
@pytest.mark.parametrize("fold", ["tp2 cp2 pp2 | ep4 etp2", "cp4 | ep8"])
def test_every_exchange_with_every_recompute(fold: str, exchange: Exchange, recompute: Recompute | None) -> None:
    config = replace(SMALL, num_attention_heads=8, num_key_value_heads=8)
    for rank in (2, 29):
        check(Step(config, 2, 4096, PipelinePlan(), exchange, recompute), fold, 32, rank)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "fold", "world", "length", "rank"),
    [("mixtral-8x22b", "tp2 cp2 pp8 | ep8", 128, 16384, 2), ("mixtral-8x22b", "tp2 cp4 pp8 | ep8", 256, 32768, 141),
     ("mixtral-8x22b", "tp4 cp4 pp8 | ep8", 512, 65536, 511), ("mixtral-8x22b", "tp4 cp8 pp8 | ep8", 1024, 131072, 1021),
     ("qwen2-57b-a14b", "tp2 cp2 pp4 | ep4", 128, 16384, 2), ("qwen2-57b-a14b", "tp4 cp8 pp4 | ep8", 1024, 131072, 1021)],
)  # fmt: skip
def test_long_rows(name: str, fold: str, world: int, length: int, rank: int) -> None:
    """The paper's context scaling: rows from 16K to 128K tokens on 128 to 1,024 ranks, cp and tp growing with them."""
    config = replace(MODELS[name], output_router_logits=True)
    check(Step(config, 8, length, PipelinePlan("1f1b"), recompute="selective"), fold, world, rank)


@pytest.mark.more
def test_heads_that_tp_does_not_divide() -> None:
    # Of 10 query and 5 key/value heads, a rank of 4 has 3, 3, 2 or 2 and repeats keys where its queries share them unequally.
    config = replace(SMALL, num_attention_heads=10, num_key_value_heads=5)
    for rank in (1, 2):
        check(Step(config, 1, 2048, exchange="ring"), "tp4 cp2 | ep4", 16, rank)


class _Backwards(head_groups._Rotation):
    """Sends to the rank that should be received from."""

    def __init__(self, x: torch.Tensor, axis: Axis) -> None:
        super().__init__(x, replace(axis, ranks=axis.ranks[::-1], index=axis.size - 1 - axis.index))


class _Homeless(head_groups._Rotation):
    """Leaves gradients, which are float32, where they were computed."""

    def __init__(self, x: torch.Tensor, axis: Axis) -> None:
        if x.dtype == torch.float32:
            self._received, self._work = x, []
        else:
            super().__init__(x, axis)


def test_a_ring_that_turns_the_wrong_way_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_groups, "_Rotation", _Backwards)
    _, missing, unforeseen = differences(Step(SMALL, 1, 2048, exchange="ring"), "cp4 | ep4", 8, 5)
    assert {m.ranks for m in missing} == {(5, 6), (4, 5)}
    assert {m.ranks for m in unforeseen} == {(5, 4), (6, 5)}
    assert sorted(missing.values()) == sorted(unforeseen.values())


def test_gradients_of_keys_that_do_not_travel_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_groups, "_Rotation", _Homeless)
    _, missing, unforeseen = differences(Step(SMALL, 1, 2048, exchange="ring"), "cp4 | ep4", 8, 5)
    # Two layers, six heads of 2 * 512 * 128 float32 in one message, four rounds.
    assert {(m.kind, m.ranks, m.bytes, n) for m, n in missing.items()} == {
        ("send", (5, 6), 6 * 2 * 512 * 128 * 4, 8), ("recv", (4, 5), 6 * 2 * 512 * 128 * 4, 8)
    }  # fmt: skip
    assert not unforeseen

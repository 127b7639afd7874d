# SPDX-License-Identifier: Apache-2.0
"""Blocks in a user's own network: every fold trains it as one process does (float64, errors below 1e-9)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_moefold import Fold
from lightning_moefold.balance.fast import ExpertCopies
from lightning_moefold.errors import UnsupportedFeature
from lightning_moefold.lifecycle.unsupported import check_blocks
from lightning_moefold.modules import Attention, MoELayer, load_balancing_loss
from lightning_moefold.modules.attention import attention
from lightning_moefold.testing import RankError, RankPool, assert_close_by_name
from lightning_moefold.testing.pieces import assemble
from tests.balance import plans
from tests.exactness import cover
from tests.networks import jobs_networks
from tests.quick import quick

FACTORS: dict[str, list[Any]] = {
    "sharding": ["optimizer", "full", "none"],
    "expert": [False, True],
    "balance": [False, True],
    "accumulate": [1, 2],
    "frozen": [False, True],
    "twice": [False, True],
    "moves": [False, True],
}
FOLDS = [
    (1, ""), (2, "tp2 | ep2"), (2, "| ep2"), (2, "tp2 | etp2"), (2, "tp2"), (2, ""), (4, "tp2 | ep4"), (4, "tp2 | ep2"),
    (4, "tp4 | ep2"), (4, "tp2 | etp2 ep2"), (4, "| ep2"), (4, "tp4 | ep4"), (4, "| etp2"), (4, "tp2 | etp4"),
    (8, "tp2 | etp2 ep2"), (8, "tp4 | ep4"),
]  # fmt: skip
QUICK = [(1, ""), (2, "| ep2"), (4, "tp2 | ep2"), (4, "tp2 | etp2 ep2")]


def _cases() -> list[Any]:
    rows = cover.deal(cover.pairwise(FACTORS), len(FOLDS), seed=4)
    return [
        pytest.param(
            world, fold, {**row, "expert": row["expert"] and "etp" not in fold}, id=f"{world}-{fold}",
            marks=() if (world, fold) in QUICK else pytest.mark.more,
        )
        for (world, fold), row in zip(FOLDS, rows, strict=True)
    ]  # fmt: skip


def check(pool: RankPool, world: int, fold: str, spec: dict[str, Any]) -> None:
    data = jobs_networks.make_data(3 * spec.get("accumulate", 1), Fold.parse(fold, world).dp)
    expected = jobs_networks.train_alone(data, spec)
    actual = pool.run(jobs_networks.train, fold, data, spec, ranks=world)
    for rank, run in enumerate(actual):
        data_rank = Fold.parse(fold, world).coordinates(rank)["dp"]
        torch.testing.assert_close(run.losses, [step[data_rank] for step in expected.losses], rtol=1e-9, atol=0)
        assert run.balance == actual[0].balance
        torch.testing.assert_close(run.balance, expected.balance, rtol=1e-9, atol=0)
    for step, grads in enumerate(expected.grads):
        found = assemble(run.grads[step] for run in actual)
        assert_close_by_name(_unclipped(found, grads), grads, 1e-9, f"gradients of step {step}, {fold} {spec}")
    assert_close_by_name(assemble(r.weights for r in actual), expected.weights, 1e-9, f"weights, {fold} {spec}")
    for name, load_E in expected.loads.items():
        assert torch.equal(sum(run.loads[name] for run in actual), load_E), name


def _unclipped(found: dict[str, torch.Tensor], clipped: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    norm = torch.cat([g.flatten() for g in found.values()]).norm()
    assert found.keys() == clipped.keys()
    return {name: g * (0.5 / (norm + 1e-6)).clamp(max=1) for name, g in found.items()}


@pytest.mark.parametrize(("world", "fold", "spec"), _cases())
def test_a_network_under_a_fold(pool: RankPool, world: int, fold: str, spec: dict[str, Any]) -> None:
    check(pool, world, fold, spec)


@pytest.mark.more
def test_copies_of_experts(pool: RankPool) -> None:
    spec = {"expert": True, "balance": True, "dispatch": {"expert_copies": ExpertCopies(plans.drawn, 2)}}
    check(pool, 4, "tp2 | ep2", spec)


@pytest.mark.more
def test_resume_under_other_folds(pool: RankPool, tmp_path: Path) -> None:
    data = jobs_networks.make_data(3, 1)
    expected = jobs_networks.train_alone(data, {"expert": False})
    folds = ["tp4 | ep2", "tp4 | etp2 ep2", "tp4 | ep4"]  # one data rank, as the data must be the same
    actual = pool.run(jobs_networks.stop_and_resume, folds, data, str(tmp_path / "last.ckpt"), ranks=4)
    found = assemble(run.weights for run in actual)
    assert_close_by_name(found, expected.weights, 1e-9, "weights")


PREDICTIONS: list[tuple[str, int, dict[str, Any]]] = [
    ("| ep4", 7, {}),
    ("tp2 | ep2", 3, {"sharding": "full"}),
    ("| etp2 ep2", 9, {"sharding": "none", "twice": True}),
    ("| ep2", 1, {"expert": True}),
    ("", 5, {"sharding": "full", "expert": True}),
    ("| ep4", 7, {"dispatch": {"capacity_factor": 50.0, "pad_to_capacity": True}}),
]


@pytest.mark.more
def test_predictions_of_unequal_number(pool: RankPool) -> None:
    """Each picture once, with the logits of one process; ranks with fewer batches, or none, keep nobody waiting."""
    outcomes = pool.run(jobs_networks.predict, PREDICTIONS, ranks=4)
    for i, (fold, count, spec) in enumerate(PREDICTIONS):
        expected = jobs_networks.predict_alone(count, spec)
        places = [Fold.parse(fold, 4).coordinates(rank)["dp"] for rank in range(4)]
        owners: dict[int, int] = {}
        for place, seen in zip(places, (run[i] for run in outcomes), strict=True):
            assert not isinstance(seen, str), seen
            for row, logits in seen.items():
                assert owners.setdefault(row, place) == place
                torch.testing.assert_close(logits, expected[row], rtol=1e-9, atol=1e-12)
        assert sorted(owners) == list(range(count)), fold


def test_a_rank_whose_prediction_fails(pool: RankPool) -> None:
    """Row 5 is on data rank 1; data rank 3 has a batch less than the others."""
    outcomes = [run[0] for run in pool.run(jobs_networks.predict, [("| ep4", 15, {"fails": 5})], ranks=4)]
    assert outcomes[1] == "OSError: the disk is full"
    assert {outcomes[rank] for rank in (0, 2, 3)} == {"PeerError: another rank has failed; its own error says why."}


@pytest.mark.parametrize(
    ("world", "fold"),
    quick([(1, ""), pytest.param(2, "tp2 | ep2", marks=pytest.mark.slow), (4, "tp2 | ep2"), (2, "")], (4, "tp2 | ep2")),
)
@pytest.mark.parametrize("sharding", quick(["full", "none"], "full"))
@pytest.mark.more
def test_mixed_precision_is_near_float32(pool: RankPool, world: int, fold: str, sharding: str) -> None:
    data = jobs_networks.make_data(2, Fold.parse(fold, world).dp)
    spec = {"expert": False, "balance": True, "sharding": sharding}
    plain, mixed = (
        pool.run(jobs_networks.train, fold, data, {**spec, "precision": precision}, ranks=world)
        for precision in ("32-true", "bf16-mixed")
    )
    # Eight bits of a mantissa and a few layers; a wrong scale would be off by a factor.
    assert mixed[0].losses[0] != plain[0].losses[0]
    assert mixed[0].losses[0] == pytest.approx(plain[0].losses[0], rel=0.03)
    expected, found = (assemble(run.grads[0] for run in runs) for runs in (plain, mixed))
    for name in ("head.weight", "blocks.0.attention.q_proj.weight", "embed.weight", "position"):
        assert found[name].dtype == torch.float32
        cosine = torch.cosine_similarity(found[name].flatten(), expected[name].flatten(), dim=0)
        assert cosine > 0.95, name
        assert float(found[name].norm()) == pytest.approx(float(expected[name].norm()), rel=0.15), name


@pytest.mark.parametrize(
    ("world", "fold", "spec", "message"),
    [
        (2, "| etp2", {"expert": True}, "etp=2 would cut experts that are modules of your own; use etp=1"),
        pytest.param(
            8,
            "| ep8",
            {"expert": False},
            "num_experts=4 does not split evenly over ep=8; use ep in 1,2,4",
            marks=pytest.mark.more,
        ),
        pytest.param(8, "tp8", {"expert": False}, "use tp", marks=pytest.mark.more),
    ],
)
def test_folds_that_cannot_cut_a_block(
    pool: RankPool, world: int, fold: str, spec: dict[str, Any], message: str
) -> None:
    with pytest.raises(RankError) as caught:
        pool.run(jobs_networks.train, fold, jobs_networks.make_data(1, Fold.parse(fold, world).dp), spec, ranks=world)
    assert set(caught.value.exception_types.values()) == {"FoldError"}
    assert all(message in text for text in caught.value.messages.values())


def test_blocks_under_autocast_outside_a_strategy() -> None:
    module = jobs_networks.Patches({"expert": False})
    pixels = torch.randn(2, 4, 7)
    expected = module(pixels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = module(pixels)
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)
    assert load_balancing_loss(module).requires_grad


def test_router_under_autocast_computes_in_float32() -> None:
    layer, x_TD = MoELayer(8, 4, 2, 8), torch.randn(5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer.gate(x_TD)
    for one, other in zip(found, layer.gate(x_TD), strict=True):
        assert torch.equal(one, other)


def test_long_rows_with_a_window_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the mask is not built whole, rotated keys (float32) meet values in 16 bits."""
    layer, x_BSD = Attention(8, 2, sliding_window=3), torch.randn(2, 9, 8)
    grads = {}
    for longest in (9, 4):
        monkeypatch.setattr(attention, "_WHOLE_MASK", longest)
        layer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer(x_BSD).float().square().sum().backward()
        grads[longest] = {name: p.grad for name, p in layer.named_parameters()}
    for name, grad in grads[9].items():
        torch.testing.assert_close(grads[4][name], grad, rtol=0.05, atol=0.05)


def test_dropout_in_experts_follows_modes_put_back_by_lightning() -> None:
    """After a validation Lightning sets ``training`` of each module by itself, without ``train()``."""
    layer = MoELayer(8, 4, 2, expert=lambda: torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.5)))
    x_TD = torch.randn(16, 8)
    for training in (False, True, False):
        for module in layer.modules():
            module.training = training
        assert torch.equal(layer(x_TD), layer(x_TD)) != training


def test_routing_is_of_the_latest_forward_pass_and_not_copied() -> None:
    layer, x_TD = MoELayer(8, 4, 2, 8, keep_routing=True), torch.randn(5, 8)
    layer(x_TD)
    twin = copy.deepcopy(layer)
    assert layer.routing is not None
    assert twin.routing is None
    assert torch.equal(twin(x_TD), layer(x_TD))
    layer.eval()(x_TD)
    with pytest.raises(ValueError, match="in training mode"):
        load_balancing_loss(layer)


class _Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        self.down.weight = self.up.weight


@pytest.mark.parametrize("shared", ["experts", "a gate's weight", "a weight of no block"])
def test_blocks_that_share_parameters_are_refused(shared: str) -> None:
    network = torch.nn.ModuleDict({"a": MoELayer(8, 4, 2, 8), "b": MoELayer(8, 4, 2, 8), "c": torch.nn.Linear(8, 4)})
    network["alias"], network["gate"] = network["a"], network["a"].gate  # a second name is no second holder
    check_blocks(network, Fold(2))
    if shared == "experts":
        network["b"].experts = network["a"].experts
    else:
        other = network["c"] if "no block" in shared else network["b"].gate
        other.weight = network["a"].gate.weight
    with pytest.raises(UnsupportedFeature, match="share a parameter"):
        check_blocks(network, Fold(2))


def test_what_a_block_refuses() -> None:
    layer = MoELayer(4, 2, 1, 8)
    with pytest.raises(ValueError, match="keep_routing=True"):
        load_balancing_loss(layer)
    with pytest.raises(ValueError, match="either ffn_hidden_size"):
        MoELayer(4, 2, 1)
    with pytest.raises(ValueError, match="buffers"):
        MoELayer(4, 2, 1, expert=lambda: torch.nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match="two names"):
        MoELayer(4, 2, 1, expert=_Tied)
    with pytest.raises(ValueError, match="keep the rows apart"):
        Attention(8, 2)(torch.randn(3, 8))
    with pytest.raises(ValueError, match="needs causal=True"):
        Attention(8, 2, causal=False, sliding_window=4)

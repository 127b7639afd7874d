# SPDX-License-Identifier: Apache-2.0
"""Compiled decoder layers: the bits of those that are not, in few graphs, under the names they had."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from lightning_moefold import MoECausalLM
from lightning_moefold.modules import DecoderLayer
from lightning_moefold.modules.recompute_parts import Recompute
from lightning_moefold.testing import make_batches, make_checkpoint
from tests.quick import quick


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def _layers(model: MoECausalLM) -> list[DecoderLayer]:
    return [layer for layer in model.modules() if isinstance(layer, DecoderLayer)]


def _model(path: Path, recompute: Recompute | None, kernel: str = "grouped_mm") -> MoECausalLM:
    model = MoECausalLM.from_pretrained(path, dtype=torch.bfloat16, output_router_logits=True)
    for layer in _layers(model):
        layer.recompute = recompute
    for layer in model.moe_layers().values():
        layer.experts.kernel = kernel
    return model


def _graphs_and_breaks() -> tuple[int, int]:
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def _same_step(plain: MoECausalLM, compiled: MoECausalLM, length: int, padding: str = "none") -> None:
    """Loss, every gradient and the load of every expert have the same bits."""
    batch = make_batches(1, 1, 3, length, 96, padding=padding, seed=length)[0][0]  # type: ignore[arg-type]
    losses = []
    for model in (plain, compiled):
        model.zero_grad()
        losses.append(model(**batch).loss)
        losses[-1].backward()
    assert torch.equal(*losses)
    for (name, ours), theirs in zip(compiled.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name
    for ours, theirs in zip(compiled.moe_layers().values(), plain.moe_layers().values(), strict=True):
        assert torch.equal(ours.load_E, theirs.load_E)


SOME = [("mixtral", "full"), ("mixtral", None), ("qwen2_moe", "full"), ("qwen3_moe", "selective")]
ALL = [(family, mode) for family in ("mixtral", "qwen2_moe", "qwen3_moe") for mode in (None, "selective", "full")]


@pytest.mark.parametrize(
    ("family", "recompute"),
    quick([pytest.param(*case, marks=[] if case in SOME else pytest.mark.slow) for case in ALL], ("mixtral", "full")),
)
def test_one_graph_with_the_same_bits(family: str, recompute: Recompute | None, tmp_path: Path) -> None:
    """Each kind of layer has a graph for the first length and one more for all others, without a break."""
    path = make_checkpoint(tmp_path / "model", family, num_experts=8, num_hidden_layers=2)
    plain, compiled = _model(path, recompute), _model(path, recompute)
    names = [name for name, _ in compiled.named_parameters()]
    for layer in _layers(compiled):
        layer.compile(backend="aot_eager", fullgraph=True)
    kinds = len({type(layer.mlp) for layer in _layers(compiled)})  # with experts, and dense
    graphs = kinds + 1 if recompute == "selective" else kinds  # attention's half is the same in both
    for step, length in enumerate((24, 32, 40, 24)):
        _same_step(plain, compiled, length)
        assert _graphs_and_breaks() == (graphs * min(step + 1, 2), 0)
    assert [name for name, _ in compiled.named_parameters()] == names == list(compiled.state_dict())


@pytest.mark.more
def test_masks_and_loops_break_graphs_and_no_bits(tmp_path: Path) -> None:
    """Attention with a mask and experts in a loop run as they are, each with a break; counts of rows make no new graph."""
    path = make_checkpoint(tmp_path / "model", "qwen3_moe", num_experts=8, num_hidden_layers=2)
    plain, compiled = _model(path, "full", "loop"), _model(path, "full", "loop")
    for layer in _layers(compiled):
        layer.compile(backend="aot_eager")
    for length in (24, 32, 40):
        _same_step(plain, compiled, length, "left")
        if length == 32:
            settled = _graphs_and_breaks()
    assert _graphs_and_breaks() == settled
    assert settled[1] > 0


def test_a_copy_is_not_compiled(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model", "mixtral", num_experts=4, num_hidden_layers=1)
    model = _model(path, None)
    [layer] = _layers(model)
    layer.compile(backend="aot_eager", fullgraph=True)
    assert copy.deepcopy(model).model.layers["0"]._compiled is None
    assert layer._compiled is not None


@pytest.mark.parametrize("family", quick(["mixtral", "qwen2_moe", "qwen3_moe"], "mixtral"))
def test_padded_rows_of_changing_lengths(family: str, tmp_path: Path) -> None:
    """The graph breaks at attention's mask, and the rest begins in the middle of a layer, where lengths are symbolic."""
    path = make_checkpoint(tmp_path / "model", family, num_experts=8, num_hidden_layers=2)
    plain, compiled = _model(path, None), _model(path, None)
    for layer in _layers(compiled):
        layer.compile(backend="aot_eager", fullgraph=True)
    for length in (24, 32, 40):
        _same_step(plain, compiled, length, "left")

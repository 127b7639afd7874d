# SPDX-License-Identifier: Apache-2.0
"""Experts by Transformer Engine, on a stub of it (:mod:`.te_stub`), against a loop over rows and against our own kernels."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import sys
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_moefold import MoEFoldStrategy
from lightning_moefold.dispatch import DispatchConfig
from lightning_moefold.dispatch.registry import DISPATCHERS
from lightning_moefold.modules import Experts, MoELayer
from lightning_moefold.modules.experts.kernels import gated_experts
from lightning_moefold.modules.experts.transformer_engine import TransformerEngineExperts, check_recipe, load
from lightning_moefold.modules.mlp import ACTIVATIONS
from lightning_moefold.modules.recompute import recomputed
from lightning_moefold.testing import RankPool
from tests.modules.experts import jobs_transformer_engine, te_stub
from tests.modules.experts.expert_cases import COUNTS, by_loop, make_rows

KINDS = ["in order", "permuted", "often or never"]
HIDDEN, WIDTH = 32, 16
SILU = ACTIVATIONS["silu"]


@pytest.fixture(autouse=True)
def stub(monkeypatch: pytest.MonkeyPatch) -> Any:
    return te_stub.install(monkeypatch)


def _inputs(counts: list[int], kind: str, dtype: torch.dtype = torch.float64) -> tuple[Any, list[torch.Tensor]]:
    torch.manual_seed(3)
    tokens, rows = make_rows(counts, kind)
    weight = rows.weight_M
    if len(weight) > 2:
        weight[2] = 0  # such a row has an output of zero, and yet its weight a gradient
    rows = dataclasses.replace(rows, weight_M=weight.to(torch.promote_types(dtype, torch.float32)).requires_grad_())
    shapes = [(tokens, HIDDEN), *[(len(counts), WIDTH, HIDDEN)] * 2, (len(counts), HIDDEN, WIDTH)]
    x, *stacks = (torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes)
    return rows, [x, rows.weight_M, *stacks]


def _engine(counts: list[int], dtype: torch.dtype = torch.float64) -> TransformerEngineExperts:
    return TransformerEngineExperts(len(counts), HIDDEN, WIDTH, dtype)


@pytest.mark.parametrize("packed", [True, False], ids=["newer", "older"])
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("counts", [*COUNTS, [16, 32, 0]])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_loop(kind: str, counts: list[int], fp8: bool, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and all gradients, of experts without rows, no rows at all, and tokens read often or never, padded or not."""
    monkeypatch.setattr(te_stub.GroupedLinear, "packed", packed)
    rows, inputs = _inputs(counts, kind)
    expected = by_loop(inputs[0], rows, SILU, *inputs[2:])
    with te_stub.autocast(enabled=fp8):
        actual = _engine(counts)(inputs[0], rows, SILU, *inputs[2:])
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    slope = torch.randn_like(expected)
    found = torch.autograd.grad(actual, inputs, slope)  # outside of the recipe, as a trainer does
    wanted = torch.autograd.grad(expected, inputs, slope) if sum(counts) else [torch.zeros_like(x) for x in inputs]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    several = kind == "often or never" and sum(counts) > 0
    assert te_stub.calls.count("permute") == several, "the fused permutation where rows are summed"
    assert te_stub.calls.count("fp8" if fp8 else "high") == 3
    uneven = any(n % te_stub.ALIGNMENT for n in counts)
    assert te_stub.calls.count("pad") == 2 * (fp8 and uneven), "tokens and weights, once"


@pytest.mark.parametrize("frozen", [(0,), (1,), (2, 3, 4), (0, 1, 2, 4)])
def test_only_what_is_asked_for_has_a_gradient(frozen: tuple[int, ...]) -> None:
    rows, inputs = _inputs(COUNTS[0], "often or never")
    whole = torch.autograd.grad(by_loop(inputs[0], rows, SILU, *inputs[2:]).square().sum(), inputs)
    for i in frozen:
        inputs[i].requires_grad_(False)
    kept = [i for i in range(len(inputs)) if i not in frozen]
    with te_stub.autocast():
        y = _engine(COUNTS[0])(inputs[0], rows, SILU, *inputs[2:])
    for i, grad in zip(kept, torch.autograd.grad(y.square().sum(), [inputs[i] for i in kept]), strict=True):
        torch.testing.assert_close(grad, whole[i], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_rounds_as_our_kernels_do(kind: str) -> None:
    rows, inputs = _inputs(COUNTS[0], kind, torch.bfloat16)
    outcomes = []
    for run in (_engine(COUNTS[0], torch.bfloat16), partial(gated_experts, kernel="grouped_mm")):
        y = run(inputs[0], rows, SILU, *inputs[2:])
        outcomes.append([y, *torch.autograd.grad(y.float().square().sum(), inputs)])
    for a, b in zip(*outcomes, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=2e-2 * float(b.detach().float().abs().max()))


def test_gradients_of_a_stack_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they are slices of one tensor; where they are not, they become one."""
    rows, inputs = _inputs(COUNTS[0], "permuted")
    stacked: list[torch.Size] = []
    stack = torch.stack
    monkeypatch.setattr(torch, "stack", lambda tensors: stacked.append(tensors[0].shape) or stack(tensors))
    for packed, copies in ((True, 0), (False, 3)):
        monkeypatch.setattr(te_stub.GroupedLinear, "packed", packed)
        _engine(COUNTS[0])(inputs[0], rows, SILU, *inputs[2:]).sum().backward()
        assert len(stacked) == copies


def test_what_is_kept_for_backward() -> None:
    """Tokens read, the two products, and what the last one takes; neither the activation nor a float32 copy."""
    rows, inputs = _inputs([16, 32, 16], "in order", torch.bfloat16)
    own = {x.untyped_storage().data_ptr() for x in inputs}
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = _engine([16, 32, 16], torch.bfloat16)(inputs[0], rows, SILU, *inputs[2:])
    assert sum(kept.values()) == 3 * 2 * 64 * WIDTH
    assert y.requires_grad


def _layers(dispatch: DispatchConfig) -> tuple[MoELayer, MoELayer, torch.Tensor]:
    torch.manual_seed(5)
    layer = MoELayer(HIDDEN, 8, 2, WIDTH, dispatch=dispatch)
    assert isinstance(layer.experts, Experts)
    other = copy.deepcopy(layer)
    layer.experts.kernel = "transformer_engine"
    return layer, other, torch.randn(2, 7, HIDDEN)


def _grads(layer: MoELayer, y: torch.Tensor) -> list[torch.Tensor]:
    return [y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))]


PADDED = DispatchConfig(capacity_factor=1.0, pad_to_capacity=True)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(
    ("dispatch", "chunks", "summed"),
    [
        (DispatchConfig(), [8], False),
        (PADDED, [8], False),
        (PADDED, [3, 3, 2], False),
        (DispatchConfig("deduplicated"), [8], True),
        (DispatchConfig("allgather"), [8], True),
    ],
    ids=["alltoall", "padded", "padded in chunks", "deduplicated", "allgather"],
)
def test_a_layer(dispatch: DispatchConfig, chunks: list[int], summed: bool, fp8: bool) -> None:
    """As with our own kernel; with chunks, each part of the experts has its own scales."""
    layer, other, x = _layers(dispatch)
    layer.dispatcher = DISPATCHERS[dispatch.dispatcher](dispatch, 8, 2)  # on one rank too
    if len(chunks) > 1:
        layer.dispatcher._sizes = chunks
    with te_stub.autocast(enabled=fp8):
        y = layer(x)
    for a, b in zip(_grads(layer, y), _grads(other, other(x)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert len(layer.experts._engines) == len(chunks)
    assert te_stub.calls.count("fp8" if fp8 else "high") == 3 * len(chunks)
    assert te_stub.calls.count("permute") == summed


def test_experts_of_two_ranks(pool: RankPool) -> None:
    """Tokens that arrive in chunks, and tokens that arrive once for several experts."""
    configs = [DispatchConfig(chunks=2), DispatchConfig("deduplicated"), DispatchConfig("allgather")]
    for outcomes in pool.run(jobs_transformer_engine.both_kernels, configs, ranks=2):
        for (results, engines), wanted in zip(outcomes, [[2, 1], [3], [3]], strict=True):
            assert engines == wanted
            for found in results[1:]:
                for a, b in zip(found, results[0], strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_layer_that_runs_again_does_so_in_its_recipe() -> None:
    """Backward is outside of autocast, and what it recomputes has the precision of the first time."""
    layer, other, x = _layers(DispatchConfig())
    recipe, seen = SimpleNamespace(), []
    layer.register_forward_pre_hook(lambda *_: seen.append(te_stub.FP8GlobalStateManager.get_fp8_recipe()))
    with te_stub.autocast(recipe=recipe):
        y = recomputed(layer, x)
    assert te_stub.calls.count("fp8") == 3
    for a, b in zip(_grads(layer, y), _grads(other, other(x)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert te_stub.calls.count("fp8") == 6
    assert te_stub.calls.count("high") == 0
    assert seen == [recipe, recipe]
    assert [call for call in te_stub.calls if "again" in call] == ["forward to be run again", "forward again"]
    assert not te_stub.FP8GlobalStateManager.is_fp8_enabled()


def test_copies_and_pickles_make_engines_of_their_own() -> None:
    layer, _, x = _layers(DispatchConfig())
    y = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.experts._engines == {}
        assert torch.equal(twin(x), y)
        assert not set(twin.experts._engines.values()) & set(layer.experts._engines.values())
    assert not any("weight0" in name for name in layer.state_dict()), "lenders are no parameters of the layer"


def test_float64_goes_by_the_loop() -> None:
    layer, other, x = _layers(DispatchConfig())
    assert torch.equal(layer.double()(x.double()), other.double()(x.double()))
    assert te_stub.calls == []


@pytest.mark.parametrize("sizes", [(24, 16), (32, 8)])
def test_widths_that_fp8_does_not_take(sizes: tuple[int, int]) -> None:
    layer = MoELayer(sizes[0], 4, 2, sizes[1])
    layer.experts.kernel = "transformer_engine"
    assert layer(torch.randn(3, sizes[0])).isfinite().all()
    with te_stub.autocast(), pytest.raises(ValueError, match=r"must divide by 16 in FP8"):
        layer(torch.randn(3, sizes[0]))


def test_a_strategy_takes_it_with_chunks() -> None:
    assert (
        MoEFoldStrategy(expert_kernel="transformer_engine", dispatch_chunks=2).settings.expert_kernel
        == "transformer_engine"
    )


def test_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", None)
    with pytest.raises(RuntimeError, match=r"needs Transformer Engine 2.9 or newer and a CUDA device"):
        load()


@pytest.mark.parametrize("group", ["none", "another", "of the stage"])
@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("recipe", ["current", "delayed", "delayed by rank"])
def test_scales_of_a_stage(recipe: str, pp: int, group: str) -> None:
    """Delayed scaling waits for a group, which must not be more than the stage."""
    stage = object()
    mesh: Any = SimpleNamespace(fold=SimpleNamespace(pp=pp), stage=SimpleNamespace(group=stage))
    given = SimpleNamespace(delayed=lambda: recipe != "current", reduce_amax=recipe == "delayed")
    groups = {"none": None, "another": object(), "of the stage": stage}
    refused = pp == 2 and recipe == "delayed" and group != "of the stage"
    with (
        te_stub.autocast(recipe=given, amax_reduction_group=groups[group]),
        pytest.raises(ValueError, match="amax_reduction_group=trainer") if refused else nullcontext(),
    ):
        check_recipe(mesh)

# SPDX-License-Identifier: Apache-2.0
"""Parts of a layer that run again in backward: the same bits, and what names no part is refused."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_moefold import MoECausalLM
from lightning_moefold.errors import InputError
from lightning_moefold.modules import MoELayer
from lightning_moefold.modules.dropped import DroppedTensors, _Dropped, dropped
from lightning_moefold.modules.experts.experts import RoutedExperts
from lightning_moefold.modules.recompute_parts import PARTS, parse_recompute, recompute_parts, recompute_text
from lightning_moefold.parallel.apply import check_recompute, tell
from lightning_moefold.parallel.pipeline.plan import PipelinePlan
from lightning_moefold.parallel.settings import Settings
from lightning_moefold.testing import make_checkpoint

EVERY = [list(parts) for n in range(1, len(PARTS) + 1) for parts in itertools.combinations(PARTS, n)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2-MoE: a dense layer between those with experts, and shared experts."""
    folder = tmp_path_factory.mktemp("model")
    return make_checkpoint(folder, "qwen2_moe", num_hidden_layers=3, mlp_only_layers=[1], num_experts=8)


def run(path: Path, recompute: Any, dtype: torch.dtype, kernel: str, adapter: bool = False) -> dict[str, torch.Tensor]:
    """Loss, gradients and loads of a step with padding."""
    model = MoECausalLM.from_pretrained(path, dtype=dtype, output_router_logits=True)
    if adapter:
        model.add_adapter({"rank": 4, "targets": ["q_proj", "down_proj", "experts"]})
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    tell(model, Settings(recompute=recompute, expert_kernel=kernel))
    ids = torch.randint(1, 96, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    loss = model(ids, labels=ids, attention_mask=mask).loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    loads = {f"load {number}": layer.load_E for number, layer in model.moe_layers().items()}
    return {"loss": loss.detach(), **found, **loads}


@pytest.mark.parametrize(
    ("dtype", "kernel", "adapter"),
    [(torch.float64, "loop", False), (torch.bfloat16, "grouped_mm", True)],
    ids=["loop", "grouped_mm with an adapter"],
)
def test_the_same_bits(checkpoint: Path, dtype: torch.dtype, kernel: str, adapter: bool) -> None:
    expected = run(checkpoint, None, dtype, kernel, adapter)
    assert len(expected) > 10
    for parts in EVERY:
        found = run(checkpoint, parts, dtype, kernel, adapter)
        assert found.keys() == expected.keys()
        wrong = [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])]
        assert not wrong, f"{parts}: {wrong}"


def test_experts_of_your_own_run_again_as_a_whole() -> None:
    torch.manual_seed(0)
    layer = MoELayer(
        8, 4, 2, expert=lambda: torch.nn.Sequential(torch.nn.Linear(8, 5), torch.nn.Tanh(), torch.nn.Linear(5, 8))
    )
    layer.double()
    x, grads = torch.randn(6, 8, dtype=torch.float64), []
    for again in (False, True):
        layer.experts.again = again
        layer.zero_grad()
        layer(x).square().sum().backward()
        grads.append([p.grad for p in layer.parameters()])
    assert all(map(torch.equal, *grads))
    assert isinstance(layer.experts, RoutedExperts)


def test_what_is_dropped_is_made_once_for_each_backward() -> None:
    calls = []

    def double(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return 2 * x

    x, weights = torch.randn(3, 4), [torch.randn(4, 5, requires_grad=True) for _ in range(2)]
    with DroppedTensors():
        y = dropped(double, x)
        z = sum((y[1:] @ w).sum() for w in weights)
    assert len(calls) == 1
    for number in (2, 3):
        found = torch.autograd.grad(z, weights, retain_graph=True)
        assert len(calls) == number
        assert torch.equal(found[0], (2 * x[1:]).sum(0)[:, None].expand(4, 5))
    assert _Dropped(lambda: x).get() is x


REFUSED = [
    ([], "names no part; use None"), (["norm", "heads"], "'heads', which is no part of a layer"),
    (["moe", "moe"], "names 'moe' twice"), ("norm", "recompute='norm' is not available"), (["full"], "'full', which is no"),
]  # fmt: skip


@pytest.mark.parametrize(("recompute", "says"), REFUSED)
def test_what_names_no_part(recompute: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Settings(recompute=recompute)


def test_what_it_does_not_go_with(checkpoint: Path) -> None:
    with pytest.raises(InputError, match="use recompute=None"):
        PipelinePlan("zbv").check(2, 8, "optimizer", ["norm"])
    with pytest.raises(InputError, match="a compiled layer cannot drop"):
        Settings(recompute=["norm"], compiler="inductor")
    model = MoECausalLM.from_pretrained(checkpoint, output_router_logits=True)
    check_recompute(model, Settings(recompute=["mlp", "moe"]))
    sparse = MoECausalLM.from_config(replace(model.config, mlp_only_layers=()))
    with pytest.raises(InputError, match="'mlp', but the model has no dense layer"):
        check_recompute(sparse, Settings(recompute=["norm", "mlp"]))


@pytest.mark.parametrize("text", ["none", "selective", "full", "norm", "norm,moe"])
def test_the_planner_has_names_for_all(text: str) -> None:
    assert recompute_text(parse_recompute(text)) == text
    assert recompute_parts(parse_recompute("norm,moe")) == {"norm", "moe"}

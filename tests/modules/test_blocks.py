# SPDX-License-Identifier: Apache-2.0
"""The blocks outside a strategy: plain modules that a user composes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lightning_moefold.modules import Attention, DecoderLayer, GatedMLP, MoELayer, RMSNorm, Router


def test_moe_layer_is_the_weighted_sum_of_its_experts() -> None:
    torch.manual_seed(0)
    layer = MoELayer(8, 4, 2, 12, shared_ffn_hidden_size=6).double()
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    expected = torch.zeros_like(x).reshape(-1, 8)
    weights, chosen, *_ = layer.gate(x.reshape(-1, 8))
    for t, token in enumerate(x.reshape(-1, 8)):
        for weight, e in zip(weights[t], chosen[t], strict=True):
            inner = F.silu(layer.experts.gate_proj[e] @ token) * (layer.experts.up_proj[e] @ token)
            expected[t] = expected[t] + weight * (layer.experts.down_proj[e] @ inner)
    shared = layer.shared_expert_gate(x).sigmoid() * layer.shared_expert(x)
    torch.testing.assert_close(layer(x), expected.view_as(x) + shared)
    assert int(layer.load_E.sum()) == 2 * 6
    layer.eval()
    layer(x)
    assert int(layer.load_E.sum()) == 2 * 6


def test_gradients() -> None:
    torch.manual_seed(1)
    for module, size in ((RMSNorm(6), 6), (GatedMLP(6, 4), 6), (MoELayer(6, 3, 2, 4), 6), (Attention(8, 4, 2), 8)):
        module = module.double()
        x = torch.randn(2, 3, size, dtype=torch.float64, requires_grad=True)
        parameters = dict(module.named_parameters())

        def run(
            x: torch.Tensor, *values: torch.Tensor, module: torch.nn.Module = module, names: tuple = tuple(parameters)
        ):  # type: ignore[no-untyped-def]
            return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

        assert torch.autograd.gradcheck(run, (x, *parameters.values()), eps=1e-6, atol=1e-5), type(module).__name__


def test_layer_is_causal() -> None:
    torch.manual_seed(2)
    layer = DecoderLayer(8, Attention(8, 4, 1, sliding_window=2), GatedMLP(8, 4)).double()
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    y = x.clone()
    y[0, 3] += 1
    changed = (layer(x) - layer(y)).abs().amax(-1)[0] > 1e-12
    assert changed.tolist() == [False, False, False, True, True]
    y = x.clone()
    y[0, 0] += 1  # the window is two keys wide
    assert ((layer(x) - layer(y)).abs().amax(-1)[0] > 1e-12).tolist() == [True, True, False, False, False]


def test_arguments_that_cannot_work() -> None:
    with pytest.raises(ValueError, match="use a divisor"):
        Attention(8, 4, 3)
    with pytest.raises(ValueError, match="head_dim=3 is odd"):
        Attention(12, 4)
    with pytest.raises(ValueError, match="between 1 and num_experts=4"):
        Router(8, 4, 5)

# SPDX-License-Identifier: Apache-2.0
"""Routers in one process: against transformers' own, and what they refuse."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_moefold import MoECausalLM, MoEConfig
from lightning_moefold.errors import ConfigError
from lightning_moefold.kernels import noise
from lightning_moefold.modules import (
    MoELayer,
    Router,
    RouterOptions,
    SwipeOptions,
    TopologyAwareOptions,
    router_z_loss,
    update_expert_bias,
)
from lightning_moefold.modules.routers import make_router
from lightning_moefold.modules.sequence import SequenceBatch
from lightning_moefold.testing import lifted
from tests.modules.routers import custom_router, naive

D, E, K, T = 12, 8, 3, 40
TOPOLOGY = {"name": "topology_aware", "nodes": 2}
TINY = {
    "model_type": "mixtral", "vocab_size": 8, "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 8, "num_local_experts": 4, "max_position_embeddings": 16,
}  # fmt: skip


def _deepseek_v3(**fields: Any) -> tuple[Any, RouterOptions]:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    config = DeepseekV3Config(hidden_size=D, n_routed_experts=E, num_experts_per_tok=K, **fields)
    return DeepseekV3TopkRouter(config), RouterOptions(score_function="sigmoid", bias_update_rate=0.001, **fields)


def _deepseek_v2(**fields: Any) -> tuple[Any, RouterOptions]:
    from transformers import DeepseekV2Config
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter

    config = DeepseekV2Config(
        hidden_size=D,
        n_routed_experts=E,
        num_experts_per_tok=K,
        topk_method="group_limited_greedy",
        num_attention_heads=4,
        **fields,
    )
    return DeepseekV2TopkRouter(config), RouterOptions(group_score_topk=1, norm_topk_prob=False, **fields)


def _qwen3(**fields: Any) -> tuple[Any, RouterOptions]:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    config = Qwen3MoeConfig(hidden_size=D, num_experts=E, num_experts_per_tok=K, **fields)
    return Qwen3MoeTopKRouter(config), RouterOptions(**fields)


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (_deepseek_v3, {"n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5}),
        (_deepseek_v3, {"n_group": 2, "topk_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 1.0}),
        (_deepseek_v2, {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0}),
        (_qwen3, {"norm_topk_prob": True}),
        (_qwen3, {"norm_topk_prob": False}),
    ],
)
def test_against_transformers(make: Any, fields: dict[str, Any]) -> None:
    torch.manual_seed(1)
    theirs, options = make(**fields)
    theirs, ours = theirs.double(), Router(D, E, K, options).double()
    with torch.no_grad():
        theirs.weight.normal_()
        ours.weight.copy_(theirs.weight)
        if options.bias_update_rate:
            theirs.e_score_correction_bias.normal_(0, 0.3)
            ours.e_score_correction_bias.copy_(theirs.e_score_correction_bias)
    x_TD = torch.randn(T, D, dtype=torch.float64)
    slope_TE = torch.randn(T, E, dtype=torch.float64)
    with lifted(torch.float64):
        logits_TE, weight_TK, expert_TK = theirs(x_TD)
    found = ours(x_TD)
    torch.testing.assert_close(found.logits_TE, logits_TE, rtol=1e-12, atol=1e-12)
    spread = [torch.zeros(T, E, dtype=torch.float64).scatter(1, e, w) for e, w in
              ((expert_TK, weight_TK), (found.expert_TK, found.weight_TK))]  # fmt: skip
    torch.testing.assert_close(spread[1], spread[0], rtol=1e-12, atol=1e-14)
    for whole in spread:
        (whole * slope_TE).sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-10, atol=1e-12)


def test_a_softmax_after_topk_is_one_before_it_normalised() -> None:
    torch.manual_seed(2)
    before, after = (Router(D, E, K, RouterOptions(softmax_after_topk=late)).double() for late in (False, True))
    after.load_state_dict(before.state_dict())
    x_TD = torch.randn(T, D, dtype=torch.float64)
    for one, other in zip(before(x_TD), after(x_TD), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_sigmoids_that_are_all_tiny_are_still_weighed_and_balanced() -> None:
    router = Router(D, E, K, RouterOptions(score_function="sigmoid"))
    with torch.no_grad():
        router.weight.fill_(-200.0)
    found = router(torch.ones(2, D))
    assert found.weight_TK.isfinite().all()
    torch.testing.assert_close(found.probability_TE.sum(-1), torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_computes_in_float32_whatever_the_precision(dtype: torch.dtype) -> None:
    layer = MoELayer(8, 4, 2, 8, router={"bias_update_rate": 1e-3}).to(dtype)
    routed = layer.gate(torch.randn(6, 8, dtype=dtype))
    assert {t.dtype for t in routed} == {torch.float32, torch.int64}
    assert layer.gate.weight.dtype == dtype
    assert layer.gate.e_score_correction_bias.dtype == torch.float32
    for _ in range(600):  # in bfloat16 a bias of 0.25 would not move any more
        layer.gate.update_bias(torch.tensor([4, 0, 2, 2]))
    torch.testing.assert_close(layer.gate.e_score_correction_bias, torch.tensor([-0.6, 0.6, 0.0, 0.0]))


def test_bias_compares_counts_as_integers() -> None:
    """In float32, and even in float64, the mean of such counts is rounded to one of them."""
    router = Router(4, 3, 1, RouterOptions(bias_update_rate=0.5))
    most = 2**53
    router.update_bias(torch.tensor([most + 1, most, most - 1]))
    assert router.e_score_correction_bias.tolist() == [-0.5, 0.0, 0.5]


def test_bias_is_updated_from_what_is_learned_from() -> None:
    layer = MoELayer(8, 4, 2, 8, router=RouterOptions(bias_update_rate=0.1))
    x_TD = torch.randn(9, 8)
    layer(x_TD)
    layer(x_TD)
    with torch.no_grad():
        layer(x_TD)
    layer.eval()(x_TD)
    assert layer.gate.counts_E.sum() == 2 * 9 * 2
    counts_E = layer.gate.counts_E.clone()
    update_expert_bias(layer)
    torch.testing.assert_close(layer.gate.e_score_correction_bias, 0.1 * torch.sign(9.0 - counts_E))
    assert not layer.gate.counts_E.any()
    assert "gate.e_score_correction_bias" in layer.state_dict()
    assert "gate.counts_E" not in layer.state_dict()
    update_expert_bias(MoELayer(8, 4, 2, 8))  # without biases nothing happens


def test_bias_evens_out_the_load() -> None:
    torch.manual_seed(0)
    layer = MoELayer(8, 4, 1, 4, router={"score_function": "sigmoid", "bias_update_rate": 0.001})
    x_TD = torch.randn(400, 8) + 1
    loads = []
    for _ in range(60):
        layer(x_TD)
        loads.append(layer.gate.counts_E.max().item() / 100)
        update_expert_bias(layer)
    assert loads[0] > 1.3
    assert loads[-1] < 1.15


# ---- noise -------------------------------------------------------------------------------------------------------------


def test_noise_is_that_of_its_coordinates() -> None:
    row_T, position_T = torch.tensor([3, 0, 7]), torch.tensor([1, 1, 20])
    found = noise.uniform(noise.hashed(5, torch.tensor(2), 4, row_T, position_T), 9, torch.float64)
    expected = [naive.noise(9, 5, 2, 4, row, position) for row, position in ((3, 1), (0, 1), (7, 20))]
    assert found.tolist() == expected


def test_noise_is_uniform_and_independent() -> None:
    key_T = noise.hashed(0, 0, 0, torch.arange(200).repeat_interleave(50), torch.arange(50).repeat(200))
    u_TD = noise.uniform(key_T, 20, torch.float64)
    assert 0 <= u_TD.min() < 0.001
    assert 0.999 < u_TD.max() < 1
    assert u_TD.mean().item() == pytest.approx(0.5, abs=0.005)
    assert u_TD.var().item() == pytest.approx(1 / 12, rel=0.02)
    correlation_DD = torch.corrcoef(u_TD.T) - torch.eye(20)
    assert correlation_DD.abs().max() < 0.05
    assert torch.corrcoef(torch.stack([u_TD[1:, 0], u_TD[:-1, 0]]))[0, 1].abs() < 0.05


def test_noise_changes_with_each_call_and_is_off_in_evaluation() -> None:
    router, x_TD = Router(D, E, K, RouterOptions(input_jitter=0.3)), torch.randn(T, D)
    first, second = router(x_TD).logits_TE, router(x_TD).logits_TE
    assert not torch.equal(first, second)
    with torch.no_grad():
        third = router(x_TD).logits_TE
    assert torch.equal(router(x_TD).logits_TE, third)  # without gradients no call is counted
    plain = Router(D, E, K)
    plain.load_state_dict({"weight": router.weight})
    assert torch.equal(router.eval()(x_TD).logits_TE, plain(x_TD).logits_TE)
    other = copy.deepcopy(router).train()
    assert torch.equal(other.call, torch.tensor(3))
    assert "call" in other.state_dict()


def test_frozen_first_layers_leave_the_count_of_calls_to_the_others() -> None:
    """As in fine-tuning with part of the model in evaluation mode."""
    fields = {"num_hidden_layers": 3, "router": {"input_jitter": 0.3}}
    model = MoECausalLM(MoEConfig.from_hf(TINY | fields)).train()
    first, *others = model.moe_layers().values()
    first.eval()
    ids = torch.ones(2, 4, dtype=torch.int64)
    for calls in (1, 2):
        model(ids, labels=ids)
        assert [int(layer.gate.call) for layer in (first, *others)] == [0, calls, calls]


# ---- forced balance, own routers ---------------------------------------------------------------------------------------


def test_forced_balance_is_even() -> None:
    router = make_router("force_balanced", D, E, K)
    routed = router(torch.randn(16, D), SequenceBatch(2, 8))
    assert torch.equal(routed.expert_TK.flatten().bincount(minlength=E), torch.full((E,), 6))
    assert all(len(set(row)) == K for row in routed.expert_TK.tolist())
    routed.weight_TK[:, 0].sum().backward()
    assert router.weight.grad.abs().sum() > 0


def test_own_router() -> None:
    layer = MoELayer(D, E, K, 8, router={"name": "tempered", "temperature": 4.0})
    assert isinstance(layer.gate, custom_router.TemperedRouter)
    torch.testing.assert_close(
        layer.gate(x := torch.randn(5, D)).probability_TE, (x @ layer.gate.weight.T / 4).softmax(-1)
    )
    assert isinstance(MoELayer(D, E, K, 8, router="tempered").gate, custom_router.TemperedRouter)
    options = custom_router.TemperedOptions(temperature=3.0, routed_scaling_factor=2.0)
    assert MoELayer(D, E, K, 8, router=options).gate.options is options
    assert options.as_dict() == {"temperature": 3.0, "routed_scaling_factor": 2.0, "name": "tempered"}

    nameless = dataclass(frozen=True, kw_only=True)(type("Nameless", (RouterOptions,), {}))
    with pytest.raises(
        ValueError, match="Nameless names the router 'top_k', whose options are RouterOptions; set its name"
    ):
        MoELayer(D, E, K, 8, router=nameless())

    class Reversed(Router):
        def choose(self, score_TE: Tensor, batch: SequenceBatch) -> Tensor:
            return super().choose(-score_TE, batch)

    gate = MoELayer(D, E, K, 8, router=Reversed).gate
    assert torch.equal(gate(x).expert_TK, (x @ gate.weight.T).topk(K, largest=False).indices)


def test_z_loss_of_a_network() -> None:
    layer = MoELayer(D, E, K, 8, keep_routing=True)
    x_TD = torch.randn(5, D)
    layer(x_TD)
    expected = (x_TD @ layer.gate.weight.T).logsumexp(-1).square().mean()
    loss = router_z_loss(layer)
    torch.testing.assert_close(loss, expected)
    (grad,) = torch.autograd.grad(loss, layer.gate.weight)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, layer.gate.weight)[0])


@pytest.mark.parametrize("router", [SwipeOptions(input_jitter=0.1), TopologyAwareOptions(nodes=2, far_fraction=0.5)])
def test_what_acts_in_training_alone_changes_no_prediction(router: RouterOptions, tmp_path: Path) -> None:
    raw = {
        "model_type": "qwen3_moe", "vocab_size": 32, "hidden_size": D, "num_attention_heads": 2, "num_key_value_heads": 2,
        "num_hidden_layers": 1, "moe_intermediate_size": 8, "num_experts": E, "num_experts_per_tok": K, "router_aux_loss_coef": 0.0,
    }  # fmt: skip
    model = MoECausalLM.from_config(MoEConfig.from_hf(raw, router=router)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
    again = MoECausalLM.from_pretrained(tmp_path)
    assert again.config.router == router
    assert type(again.moe_layers()[0].gate) is type(make_router(router, D, E, K))
    assert [router.changes_training, router.changes_prediction] == [True, False]
    ids = torch.randint(32, (2, 7))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-6)
    assert replace(router, routed_scaling_factor=2.0).changes_prediction


# ---- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("router", "message"),
    [
        (
            "nobody",
            "router 'nobody' is not registered; use one of 'force_balanced', 'swipe', 'tempered', 'top_k', 'topo",
        ),
        ({"topk": 2}, "router has no option 'topk'; RouterOptions has bias_update_rate, group_score_topk"),
        ({"score_function": "tanh"}, "use 'softmax' or 'sigmoid'"),
        ({"score_function": "sigmoid", "softmax_after_topk": True}, "goes with score_function='softmax' only"),
        ({"softmax_after_topk": True, "norm_topk_prob": False}, "leave out norm_topk_prob=False or"),
        ({"n_group": 3}, "n_group=3 must divide num_experts=8"),
        ({"n_group": 4, "topk_group": 5}, "topk_group=5 must lie between 1 and n_group=4"),
        ({"n_group": 4, "topk_group": 1}, "top_k=3 is more than the 2 experts of topk_group=1 groups"),
        ({"n_group": 8, "topk_group": 4}, "group_score_topk=2 is more than the 1 experts of a group"),
        ({"group_score_topk": 0}, "group_score_topk=0 must be at least 1"),
        ({"bias_update_rate": -0.1}, "must not be negative"),
        ({"input_jitter": 1.0}, "must lie between 0 and 1"),
        (
            {"name": "swipe", "n_group": 4, "topk_group": 2},
            "n_group=4 cannot be used with the router 'swipe', which may",
        ),
        ({"name": "swipe", "nodes": 2}, "router has no option 'nodes'; SwipeOptions has bias_update_rate"),
        ("topology_aware", "nodes=0 must be at least 1; give the nodes over which the experts are spread"),
        ({**TOPOLOGY, "nodes": 3}, "nodes=3 must divide num_experts=8"),
        (
            {**TOPOLOGY, "nodes": 4},
            "top_k=3 is more than the 2 experts of one of nodes=4, but all of a token's experts must fit",
        ),
        ({**TOPOLOGY, "far_fraction": 1.5}, "far_fraction=1.5 must lie between 0 and 1"),
        ({**TOPOLOGY, "far_fraction": -0.1}, "far_fraction=-0.1 must lie between 0 and 1"),
        (
            {**TOPOLOGY, "data_ranks": 3},
            "data_ranks=3 must be a multiple of nodes=2, so that each node has equally many",
        ),
        ({**TOPOLOGY, "data_ranks": 0}, "data_ranks=0 must be a multiple of nodes=2"),
        ({**TOPOLOGY, "n_group": 2}, "n_group=2 cannot be used with the router 'topology_aware'"),
    ],
)
def test_refusals(router: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoELayer(D, E, K, 8, router=router)
    raw = {
        "model_type": "mixtral", "vocab_size": 32, "hidden_size": D, "num_attention_heads": 2, "num_key_value_heads": 2,
        "num_hidden_layers": 1, "intermediate_size": 8, "num_local_experts": E, "num_experts_per_tok": K,
    }  # fmt: skip
    with pytest.raises(ConfigError, match=f"router: .*{message}"):
        MoEConfig.from_hf(raw, router=router)
    with pytest.raises(ConfigError, match="aux_loss='batch' is not known; use one of 'huggingface', 'microbatch'"):
        MoEConfig.from_hf(raw, aux_loss="batch")

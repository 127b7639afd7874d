# SPDX-License-Identifier: Apache-2.0
"""The memory model against the real modules: parameters of a rank, and what autograd keeps."""

import math

import pytest
import torch

from lightning_moefold.fold import Fold
from lightning_moefold.layout import Family, ParameterLayout, ParameterPlan
from lightning_moefold.models import MoECausalLM
from lightning_moefold.models.config import MoEConfig
from lightning_moefold.modules import experts
from lightning_moefold.modules.base import ParallelModule
from lightning_moefold.planner import MODELS, PRESETS, CostModel, Job
from lightning_moefold.planner.schedules import pipeline_layout

TINY = {
    "vocab_size": 512, "hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32,
    "moe_intermediate_size": 192, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True,
}  # fmt: skip
FAMILIES = {
    "mixtral": {"intermediate_size": 0, "shared_expert_intermediate_size": 0},
    "qwen2_moe": {"intermediate_size": 512, "shared_expert_intermediate_size": 384, "qkv_bias": True},
    "qwen3_moe": {"intermediate_size": 512, "shared_expert_intermediate_size": 0, "qk_norm": True},
}


def costs(model, precision="bf16-true", ranks=1, length=256):
    return CostModel(Job(model, ranks, PRESETS["dgx-h100"], 2 * ranks, length, precision))


@pytest.mark.parametrize("name", ["mixtral-8x22b", "qwen2-57b-a14b", "qwen3-30b-a3b"])
@pytest.mark.parametrize("text", ["ep8", "tp2 | ep4 etp2", "tp4 | ep8", "tp8 | ep2"])
def test_parameters_of_a_rank(name, text):
    """Cuts of the real modules, at full size, without storage."""
    config, fold = MODELS[name], Fold.parse(text, 16)
    if config.num_attention_heads % fold.tp:
        pytest.skip("heads are uneven: the planner counts the largest rank")
    with torch.device("meta"):
        model = MoECausalLM(config)
    plans = {
        f"{prefix}.{leaf}": plan
        for prefix, module in model.named_modules()
        if isinstance(module, ParallelModule)
        for leaf, plan in module.plans(fold).items()
    }
    held = {Family.DENSE: 0, Family.EXPERT: 0}
    for key, parameter in model.named_parameters():
        plan = plans.get(key, ParameterPlan())
        box = ParameterLayout(tuple(parameter.shape), plan).tensor_box(fold.coordinates(0))
        held[plan.family] += math.prod(box.sizes)
    layers = pipeline_layout(config, 1, 1, "1f1b")[0]
    predicted = costs(config).memory.parameters(fold.tp, fold.ep, fold.etp, layers)
    assert (predicted.dense, predicted.expert) == (held[Family.DENSE], held[Family.EXPERT])


def saved_bytes(config, dtype, rows, length):
    """Bytes of distinct storages that a forward pass keeps for backward, weights left out."""
    model = MoECausalLM.from_config(config, seed=0).to(dtype)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept, sizes = [], {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    ids = torch.randint(0, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss
    assert loss.requires_grad
    return sum(sizes.values())


@pytest.mark.filterwarnings("ignore:router_aux_loss_coef")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, "32-true"), (torch.bfloat16, "bf16-true")])
def test_what_autograd_keeps_of_a_layer(family, dtype, precision, monkeypatch):
    # The planner is for GPUs, where the experts are three grouped products under autograd.
    monkeypatch.setattr(experts, "_kernel_takes", lambda *_: True)
    configs = [MoEConfig(**TINY, model_type=family, num_hidden_layers=n, **FAMILIES[family]) for n in (1, 2)]
    one, two = (saved_bytes(config, dtype, 2, 256) for config in configs)
    predicted, _, _ = costs(configs[0], precision).memory._saved(1, 1, 1, 1, 2, "none", "alltoall")
    assert predicted == pytest.approx(two - one, rel=0.015)

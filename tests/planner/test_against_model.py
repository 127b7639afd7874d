# SPDX-License-Identifier: Apache-2.0
"""The memory model against the real modules: parameters of a rank, and what autograd keeps."""

from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_moefold import LoRA
from lightning_moefold.fold import Fold
from lightning_moefold.layout import Family, ParameterLayout, ParameterPlan
from lightning_moefold.models import MoECausalLM
from lightning_moefold.models.config import MoEConfig
from lightning_moefold.modules import offload
from lightning_moefold.modules.base import ParallelModule
from lightning_moefold.modules.recompute_parts import parse_recompute
from lightning_moefold.optim import offload_state
from lightning_moefold.parallel.apply import tell
from lightning_moefold.parallel.roots import _data_dim
from lightning_moefold.parallel.settings import Settings
from lightning_moefold.planner import MODELS, PRESETS, CostModel, Job, Plan
from lightning_moefold.planner.cost.schedules import RankLayers, pipeline_layout
from tests.quick import quick

TINY = {
    "vocab_size": 512, "hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32,
    "moe_intermediate_size": 192, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True,
}  # fmt: skip
FAMILIES = {
    "mixtral": {"intermediate_size": 0, "shared_expert_intermediate_size": 0},
    "qwen2_moe": {"intermediate_size": 512, "shared_expert_intermediate_size": 384, "qkv_bias": True},
    "qwen3_moe": {"intermediate_size": 512, "shared_expert_intermediate_size": 0, "qk_norm": True},
}


def costs(model, precision="bf16-true", ranks=1, length=256, **changes):
    return CostModel(Job(model, ranks, PRESETS["dgx-h100"], 2 * ranks, length, precision, **changes))


@lru_cache
def layouts(name, text, world):
    """Of every parameter at full size, without storage, as the strategy makes them."""
    config, fold = MODELS[name], Fold.parse(text, world)
    with torch.device("meta"):
        model = MoECausalLM(config)
    plans = {
        f"{prefix}.{leaf}": plan
        for prefix, module in model.named_modules()
        if isinstance(module, ParallelModule)
        for leaf, plan in module.plans(fold).items()
    }
    found = []
    for key, parameter in model.named_parameters():
        layout = ParameterLayout(tuple(parameter.shape), plans.get(key, ParameterPlan()))
        sizes, ranks = layout.tensor_box(fold.coordinates(0)).sizes, fold.size(layout.data_axis)
        found.append(replace(layout, data_dim=_data_dim(sizes, layout.plan, ranks) if ranks > 1 else None))
    return fold, found


@pytest.mark.parametrize("name", ["mixtral-8x22b", "qwen2-57b-a14b", "qwen3-30b-a3b"])
@pytest.mark.parametrize("text", ["ep8", "tp2 cp2 | ep4 etp2", "tp4 | ep8", "tp8 | ep2"])
def test_bytes_of_a_rank_are_those_of_the_layouts(name, text):
    """Weights, gradients and moments, to the byte: heads that tp does not divide and pieces that differ included."""
    fold, found = layouts(name, text, 64)
    whole, padded = dict.fromkeys(Family, 0), dict.fromkeys(Family, 0)
    stored = dict.fromkeys(Family, 0)
    for layout in found:
        whole[layout.plan.family] += layout.tensor_box(fold.coordinates(0)).numel
        stored[layout.plan.family] += layout.stored_box(fold, 0).numel
        padded[layout.plan.family] += layout.stored_box(fold, 0).numel * fold.size(layout.data_axis)
    held = pipeline_layout(MODELS[name], 1, 1, "1f1b")[0]
    memory = CostModel(Job(MODELS[name], 64, PRESETS["dgx-h100"], 128, 256, "32-true")).memory
    predicted = memory.parameters(fold.tp, fold.ep, fold.etp, held)
    assert (predicted.dense, predicted.expert) == (whole[Family.DENSE], whole[Family.EXPERT])
    gathered = padded[Family.DENSE] + (padded[Family.EXPERT] if fold.edp > 1 else 0)
    weights, gradients, moments = memory.states(fold, held, accumulates=False)
    mine = sum(stored.values())
    spreads = fold.dp * fold.cp, fold.edp
    one = memory.shards(fold.tp, fold.ep, fold.etp, RankLayers(1, 0), *spreads)
    live = sum(ranks * number for ranks, number in zip(spreads, one, strict=True) if ranks > 1)
    assert (weights, gradients, moments) == (4 * (mine + gathered), 4 * (mine + live), 8 * mine)


#: `python benchmarks/memory.py --hidden 256` counted these on the rank that holds most (float32, AdamW), in 10^6 bytes:
#: stored weights, gradients, optimizer state, weights gathered between forward and backward.
MEASURED = {
    (2, "", "none"): (86.3, 86.3, 172.6, 0.0),
    (2, "", "optimizer"): (43.2, 43.2, 86.3, 86.3),
    (2, "", "full"): (43.2, 43.2, 86.3, 32.8),
    (2, "| ep2", "none"): (61.2, 61.2, 122.3, 0.0),
    (2, "| ep2", "optimizer"): (43.2, 43.2, 86.3, 36.0),
    (2, "| ep2", "full"): (43.2, 43.2, 86.3, 32.8),
    (2, "tp2 | ep2", "none"): (43.2, 43.2, 86.4, 0.0),
    (2, "tp2 | ep2", "optimizer"): (43.2, 43.2, 86.4, 0.0),
    (2, "tp2 | ep2", "full"): (43.2, 43.2, 86.4, 0.0),
    (4, "", "none"): (86.3, 86.3, 172.6, 0.0),
    (4, "", "optimizer"): (21.6, 21.6, 43.2, 86.3),
    (4, "", "full"): (21.6, 21.6, 43.2, 32.8),
    (4, "| ep2", "none"): (61.2, 61.2, 122.3, 0.0),
    (4, "| ep2", "optimizer"): (21.6, 21.6, 43.2, 61.2),
    (4, "| ep2", "full"): (21.6, 21.6, 43.2, 32.8),
    (4, "tp2 | ep4", "none"): (30.6, 30.6, 61.2, 0.0),
    (4, "tp2 | ep4", "optimizer"): (21.6, 21.6, 43.2, 18.0),
    (4, "tp2 | ep4", "full"): (21.6, 21.6, 43.2, 16.4),
}


@pytest.mark.parametrize(("ranks", "text", "sharding"), MEASURED)
def test_states_are_those_counted_on_ranks(ranks, text, sharding):
    config = MoEConfig(
        model_type="mixtral", vocab_size=16000, hidden_size=256, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, head_dim=32, intermediate_size=0, moe_intermediate_size=256,
        shared_expert_intermediate_size=0, num_experts=16, num_experts_per_tok=2, norm_topk_prob=True,
        router_aux_loss_coef=0.0,
    )  # fmt: skip
    fold = Fold.parse(text, ranks)
    memory = CostModel(Job(config, ranks, PRESETS["cpu"], fold.dp, 128, "32-true", sharding)).memory
    held = pipeline_layout(config, 1, 1, "1f1b")[0]
    weights, gradients, moments = memory.states(fold, held, accumulates=False)
    spreads = fold.dp * fold.cp, fold.edp
    one = memory.shards(fold.tp, fold.ep, fold.etp, RankLayers(1, 0), *spreads)
    layer = 4 * sum(ranks * number for ranks, number in zip(spreads, one, strict=True) if ranks > 1)
    gradients -= 0 if sharding == "none" else layer  # one layer's, whole on their way to being scattered
    weights -= 2 * layer if sharding == "full" else 0  # two layers', gathered while they compute
    stored, reduced, state, gathered = MEASURED[ranks, text, sharding]
    for predicted, counted in ((weights, stored + gathered), (gradients, reduced), (moments, state)):
        assert predicted / 1e6 == pytest.approx(counted, abs=0.11)


class Storages(TorchDispatchMode):
    """Remembers the storages that operations make, without keeping them alive."""

    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def alive(self):
        return sum(size for reference, size in self.made.values() if not reference.expired())


def saved_bytes(config, dtype, rows, length, recompute=None, lora_rank=None):
    """Bytes of the storages of a forward pass that live on, as autograd keeps them for backward."""
    model = MoECausalLM.from_config(config, seed=0).to(dtype)
    if lora_rank:
        model.add_adapter(LoRA(rank=lora_rank))
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    tell(model, Settings(recompute=recompute, expert_kernel="grouped_mm"))  # the planner is for GPUs
    ids = torch.randint(0, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    with Storages() as storages:
        loss = model(input_ids=ids, labels=ids).loss
    assert loss.requires_grad
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    return storages.alive() - sum(size for key, (_, size) in storages.made.items() if key in weights)


RECOMPUTES = [
    "none",
    "selective",
    "full",
    "norm",
    "attention,norm",
    "expert_activation",
    "norm,expert_activation",
    "moe",
    "norm,moe",
]


@pytest.mark.filterwarnings("ignore:router_aux_loss_coef")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora_rank", [None, 16])
@pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, "32-true"), (torch.bfloat16, "bf16-true")])
def test_what_autograd_keeps_of_a_layer(family, dtype, precision, lora_rank):
    configs = [MoEConfig(**TINY, model_type=family, num_hidden_layers=n, **FAMILIES[family]) for n in (1, 2)]
    for recompute in RECOMPUTES[:3] if lora_rank else RECOMPUTES:
        one, two = (saved_bytes(config, dtype, 2, 256, parse_recompute(recompute), lora_rank) for config in configs)
        predicted, _, _ = costs(configs[0], precision, lora_rank=lora_rank).memory._saved(
            1, 1, 1, 1, 2, recompute, "alltoall"
        )
        assert predicted == pytest.approx(two - one, rel=0.025, abs=20_000), recompute


@pytest.mark.filterwarnings("ignore:router_aux_loss_coef")
def test_what_autograd_keeps_of_a_dense_layer():
    sizes = TINY | FAMILIES["qwen2_moe"] | {"model_type": "qwen2_moe", "mlp_only_layers": (1,)}
    configs = [MoEConfig(**sizes, num_hidden_layers=n) for n in (1, 2)]
    for recompute in ("none", "norm", "mlp", "norm,mlp"):
        one, two = (saved_bytes(config, torch.bfloat16, 2, 256, parse_recompute(recompute)) for config in configs)
        _, predicted, _ = costs(configs[1], "bf16-true").memory._saved(1, 1, 1, 1, 2, recompute, "alltoall")
        assert predicted == pytest.approx(two - one, rel=0.025, abs=20_000), recompute


OFFLOADED = [(family, recompute) for family in FAMILIES for recompute in ("none", "norm", "full")]


def moved_bytes(monkeypatch, config, dtype, recompute):
    """Bytes that a step of a model copies to host memory: activations, then the optimizer's state."""
    monkeypatch.setattr(offload, "DEVICES", {"cpu"})
    monkeypatch.setattr(offload, "SMALLEST", 0)
    moved, make = [], offload._Kept.__init__

    def count(self, tensor, streams):
        moved.append(tensor.nbytes)
        make(self, tensor, streams)

    monkeypatch.setattr(offload._Kept, "__init__", count)
    model = MoECausalLM.from_config(config, seed=0).to(dtype)
    tell(model, Settings(recompute=parse_recompute(recompute), expert_kernel="grouped_mm", offload=True))
    optimizer = offload_state(torch.optim.AdamW(model.parameters()))
    ids = torch.randint(0, config.vocab_size, (2, 256), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    return sum(moved), sum(host.nbytes for _, _, host in vars(optimizer)["_moefold_offloaded"]._away)


@pytest.mark.filterwarnings("ignore:router_aux_loss_coef")
@pytest.mark.parametrize(("family", "recompute"), quick(OFFLOADED, ("qwen2_moe", "norm")))
def test_what_offloading_moves(monkeypatch, family, recompute):
    """Host memory receives what the planner counts, and the device keeps three layers' activations."""
    config = MoEConfig(**TINY, model_type=family, num_hidden_layers=4, **FAMILIES[family])
    activations, state = moved_bytes(monkeypatch, config, torch.bfloat16, recompute)
    memory = costs(config, "bf16-true").memory
    plan = Plan(Fold(1), 2, recompute=recompute)
    stays, goes = (memory.estimate(replace(plan, offload=name)) for name in ("none", "activations,state"))
    assert goes.host_activations == stays.activations == pytest.approx(activations, rel=0.025, abs=20_000)
    assert goes.host_state == stays.optimizer == pytest.approx(state, rel=0.001)
    assert goes.activations == pytest.approx(3 / 4 * stays.activations)
    # The state is whole during the step, when nothing of forward and backward is there.
    before = stays.weights + stays.gradients
    assert goes.total == pytest.approx(
        max(before + state, before + goes.activations + goes.buffers + goes.logits), rel=0.01
    )

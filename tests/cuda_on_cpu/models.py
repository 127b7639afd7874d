# SPDX-License-Identifier: Apache-2.0
"""A whole model on fake CUDA tensors under a fold of a fake process group: forward, backward, and where gradients are.

Import after :func:`fake_cuda.load` only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import cuda_bytes
import torch
import torch.distributed as dist
import torch.distributed.fsdp._fully_shard._fsdp_collectives as fsdp_collectives
import torch.distributed.fsdp._fully_shard._fsdp_init as fsdp_init
import torch.distributed.fsdp._fully_shard._fsdp_param_group as fsdp_group
import torch.distributed.fsdp._fully_shard._fsdp_state as fsdp_state
import torch.distributed.fsdp._fully_shard._fully_shard as fsdp_shard
from fake_cuda import kernels  # noqa: F401  (takes the place of kernels before the package is imported)
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_moefold.dispatch import DispatchConfig, ExpertAxes
from lightning_moefold.fold import Fold
from lightning_moefold.mesh import FoldedMesh, forget_groups
from lightning_moefold.models import MoECausalLM, MoEConfig
from lightning_moefold.models.weights import deferred_weights
from lightning_moefold.parallel import (
    GradientNorm,
    GradientSum,
    PipelinePlan,
    Settings,
    Sharding,
    local_part,
    parallelize,
)
from lightning_moefold.parallel.parameters import ParameterRegistry
from lightning_moefold.testing.rehearsal import scale
from tests.cuda_on_cpu.deterministic import Refusals


@dataclass(frozen=True)
class Run:
    """One rank of a fold, and how it runs."""

    fold: str
    world: int
    rank: int = 0
    rows: int = 2
    length: int = 64
    precision: str = "bf16-mixed"
    recompute: Any = None
    exchange: Any = "auto"
    plan: PipelinePlan = field(default_factory=PipelinePlan)
    config: dict[str, Any] = field(default_factory=dict)


_WINDOW = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 4}

RUNS = {
    "one rank, bf16-mixed": Run("tp1", 1),
    "one rank, bf16-true": Run("tp1", 1, precision="bf16-true"),
    "float32, window": Run("tp1", 1, precision="32-true", config=_WINDOW),
    "tp, ep": Run("tp2 | ep4", 8),
    "etp": Run("tp2 | ep2 etp2", 8),
    "plain experts": Run("tp2 | ep2", 8, precision="bf16-true", config={"num_experts": 4}),
    "cp": Run("cp2 | ep4", 8),
    "full recomputation": Run("cp2 tp2 | ep4", 8, recompute="full"),
    "selective recomputation": Run("tp1", 1, recompute="selective"),
    "ring": Run("cp2 | ep2", 4, exchange="ring", length=128),
    "ring, window": Run("cp2 | ep2", 4, exchange="ring", length=128, config=_WINDOW),
    "all-gather": Run("cp2 | ep2", 4, exchange="all_gather", length=128),
    "all-to-all": Run("cp2 | ep2", 4, exchange="all_to_all", length=128),
    "1f1b": Run("pp2 | ep2", 4, plan=PipelinePlan("1f1b")),
    "interleaved": Run("pp2 tp2 | ep2", 8, plan=PipelinePlan("interleaved_1f1b", 2), rows=4),
    "zbv": Run("pp2 | ep2", 4, rank=3, plan=PipelinePlan("zbv"), rows=4),
}

_CONFIG = {
    "model_type": "qwen2_moe", "vocab_size": 512, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "intermediate_size": 512, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 256,
    "num_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 4096, "output_router_logits": True,
    "decoder_sparse_step": 1,
}  # fmt: skip


class _Device:
    """What FSDP2 asks of ``torch.cuda``, answered as on CPU."""

    @staticmethod
    def current_device() -> int:
        return 0

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)


def _no_fork(*_: Any, **__: Any) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


@contextlib.contextmanager
def a_device_without_kernels() -> Iterator[None]:
    """Meshes keep real numbers; FSDP2 and generators ask no CUDA library."""
    handle = {"_get_device_handle": lambda *_: _Device()}
    with contextlib.ExitStack() as stack:
        for module in (fsdp_collectives, fsdp_init, fsdp_group, fsdp_state, fsdp_shard):
            if hasattr(module, "_get_device_handle"):
                stack.enter_context(mock.patch.multiple(module, **handle))
        cuda = {"get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8), "set_rng_state": lambda *_, **__: None}
        streams = {"current_device": lambda: 0, "current_stream": lambda *_: None}
        stack.enter_context(mock.patch.multiple(torch.cuda, **cuda, **streams))
        stack.enter_context(mock.patch.object(torch.random, "fork_rng", _no_fork))
        for name in ("__init__", "_concatenate", "_get_root_mesh", "__getitem__", "_flatten"):
            found = DeviceMesh.__dict__.get(name)
            if found is not None:
                stack.enter_context(mock.patch.object(DeviceMesh, name, _with_numbers(found)))
        yield


def _with_numbers(method: Any) -> Any:
    function = method.__func__ if isinstance(method, staticmethod) else method

    def call(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return staticmethod(call) if isinstance(method, staticmethod) else call


class _Balanced(scale._Balanced):
    """Counts on the device, where a real exchange has them."""

    def _sizes_of_exchange(self, choices: Any) -> Any:
        sizes, counts = super()._sizes_of_exchange(choices)
        return sizes, [count.to("cuda") for count in counts]


def train(run: Run) -> dict[str, Any]:
    """A step: on which devices gradients are, which are missing, and where the host waited."""
    fold = Fold.parse(run.fold, run.world)
    dist.init_process_group("fake", rank=run.rank, world_size=run.world, store=FakeStore())
    try:
        with a_device_without_kernels():
            return _train(run, fold)
    finally:
        forget_groups()
        dist.destroy_process_group()


def _train(run: Run, fold: Fold) -> dict[str, Any]:
    mesh = FoldedMesh(fold, "cuda", wrap_single=run.precision == "bf16-mixed")
    model = _model(run, mesh)
    counter = cuda_bytes.Counter()  # zeros: what the host asks for is faults in the data
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cuda")
        for layer in model.moe_layers().values():  # made on meta, which moving does not reach
            layer.load_E = torch.zeros(layer.num_experts, dtype=torch.int64, device="cuda")
            layer.dropped_E = torch.zeros(layer.num_experts, dtype=torch.int64, device="cuda")
        ids = torch.zeros(run.rows, run.length, dtype=torch.int64, device="cuda")
        registry = ParameterRegistry(model, mesh)
        sums = GradientSum(registry.unfinished_gradients())
        norm = GradientNorm(registry, torch.device("cuda"))
        with counter, Refusals() as refusals:
            with sums.around_backward():
                model(input_ids=ids, labels=ids).loss.backward()
            norm.clip(list(model.parameters()), 1.0)
        grads = {name: p.grad for name, p in model.named_parameters()}
    return {
        "devices": sorted({str(local_part(grad).device) for grad in grads.values() if grad is not None}),
        "missing": [name for name, grad in grads.items() if grad is None],
        "reads": counter.reads,
        "copies": counter.copies,
        "moe_layers": len(model.moe_layers()),
        "refused": refusals.found,
    }


def _model(run: Run, mesh: FoldedMesh) -> MoECausalLM:
    with deferred_weights(), torch.device("meta"):
        model = MoECausalLM(MoEConfig.from_hf({**_CONFIG, **run.config}))
    if run.precision == "bf16-true":
        model.to(torch.bfloat16)
    sharding = Sharding("optimizer", torch.bfloat16 if run.precision == "bf16-mixed" else None)
    microbatches = run.rows if mesh.fold.pp > 1 else 1
    settings = Settings(sharding, run.plan, microbatches, recompute=run.recompute, exchange=run.exchange)
    with FakeTensorMode(allow_non_fake_inputs=True):
        parallelize(model, mesh, settings, torch.device("meta"))
    if model.pipeline is not None:
        runner = model.pipeline.runner  # type: ignore[attr-defined]
        make = runner._make_schedule
        runner._make_schedule = lambda *args: scale._static(make(*args))
    for layer in model.moe_layers().values():
        if mesh.axis("etp_ep").size > 1:
            axes = ExpertAxes.of(mesh, DispatchConfig())
            layer.dispatcher = _Balanced(DispatchConfig(), layer.num_experts, layer.top_k, axes)
    return model

# SPDX-License-Identifier: Apache-2.0
"""Rehearses one rank of thousands without the others: its groups, its shard, and every collective of a training step.

torch's fake process group replaces the other ranks and fake tensors replace storage. So rank r of 4,096 can build its
mesh, its part of a model of any size and its optimizer, and run a step of the real code in seconds. The recorded
operations are those of a real rank. Routing is assumed to be balanced. :mod:`.expected` computes what the fold
requires.

Legend: E experts.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_moefold import comm
from lightning_moefold.dispatch import DispatchConfig, ExpertAxes
from lightning_moefold.dispatch.alltoall import AllToAllDispatcher, ChunkPlan
from lightning_moefold.dispatch.permutation import Copies, SortedChoices
from lightning_moefold.errors import InputError
from lightning_moefold.fold import Fold
from lightning_moefold.mesh import FoldedMesh, forget_groups
from lightning_moefold.models import MoECausalLM, MoEConfig, causal_lm
from lightning_moefold.models.weights import deferred_weights
from lightning_moefold.modules.attention.exchanges import Exchange
from lightning_moefold.modules.recompute_parts import Recompute
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
from lightning_moefold.parallel.pipeline.pipeline import Pipeline
from lightning_moefold.testing.rehearsal.live import LiveMemory
from lightning_moefold.testing.rehearsal.messages import Message


@dataclass(frozen=True)
class Step:
    """The training step to rehearse.

    Args:
        config: Configuration of the model.
        num_microbatches: Number of rows of a data rank; each row is one micro-batch.
        sequence_length: Number of tokens of a row.
        plan: Schedule and cut of the pipeline.
        exchange: Name of the context parallel exchange.
        recompute: What the layers recompute in backward.
    """

    config: MoEConfig
    num_microbatches: int
    sequence_length: int
    plan: PipelinePlan = field(default_factory=PipelinePlan)
    exchange: Exchange = "auto"
    recompute: Recompute | None = None

    @property
    def settings(self) -> Settings:
        """Returns the settings of the step: ``bf16-mixed``, with the experts' GPU kernel."""
        return Settings(
            Sharding("optimizer", torch.bfloat16), self.plan, self.num_microbatches, expert_kernel="grouped_mm",
            recompute=self.recompute, exchange=self.exchange,
        )  # fmt: skip


@dataclass
class Rehearsal:
    """The result of a rehearsal.

    Args:
        fold: The fold.
        rank: The rehearsed rank.
        model: The rank's part of the model, without storage.
        memory: Bytes of ``weights``, ``gradients``, and ``state`` (AdamW).
        promised: The same bytes, computed from the layouts.
        peak: Largest number of bytes that existed at the same time before the optimizer step, without the state of
            AdamW.
        messages: Number of calls of each collective in a step.
        seconds: Duration of each phase in seconds.
    """

    fold: Fold
    rank: int
    model: MoECausalLM
    memory: dict[str, int]
    promised: dict[str, int]
    peak: int
    messages: Counter[Message]
    seconds: dict[str, float]


def rehearse(step: Step, fold: Fold, rank: int) -> Rehearsal:
    """Builds what ``rank`` holds under ``bf16-mixed`` and runs one step of AdamW with clipping.

    It must be called in a process without a process group, and leaves none behind.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=fold.world_size, store=FakeStore())
    try:
        return _rehearse(step, fold)
    finally:
        forget_groups()
        dist.destroy_process_group()


def _rehearse(step: Step, fold: Fold) -> Rehearsal:
    clock = _Clock()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # so that the code for this device runs
    mesh = FoldedMesh(fold, device.type, wrap_single=True)
    clock.lap("mesh")
    with deferred_weights(), torch.device("meta"):
        model = MoECausalLM(step.config)
    parallelize(model, mesh, step.settings, torch.device("meta"))
    for layer in model.moe_layers().values():
        axes = ExpertAxes.of(mesh, DispatchConfig())
        layer.dispatcher = _Balanced(DispatchConfig(), layer.num_experts, layer.top_k, axes)
    recorder = Recorder(fold)
    ids = torch.zeros(step.num_microbatches, step.sequence_length, dtype=torch.int64, device=device)
    with FakeTensorMode(allow_non_fake_inputs=True), _real_batches(model):
        model.to_empty(device=device)
        registry = ParameterRegistry(model, mesh)
        gradient_sum = GradientSum(registry.unfinished_gradients())
        norm = GradientNorm(registry, device)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        clock.lap("build")
        recorder.live.see([local_part(parameter) for parameter in model.parameters()])
        with recorder, gradient_sum.around_backward():
            model(input_ids=ids, labels=ids).loss.backward()
        with recorder:
            norm.clip(list(model.parameters()), 1.0)
        optimizer.step()
        clock.lap("step")
        model.release_gathered_weights()
        memory = _count(model, optimizer)
    promised, peak = promise(model, fold, mesh.rank), recorder.live.peak
    return Rehearsal(fold, mesh.rank, model, memory, promised, peak, recorder.messages, clock.seconds)


def promise(model: MoECausalLM, fold: Fold, rank: int) -> dict[str, int]:
    """Bytes on a rank from the layouts alone: float32 weights and gradients, and two moments."""
    stored = sum(layout.stored_box(fold, rank).numel for layout in model.layouts.values())
    return {"weights": 4 * stored, "gradients": 4 * stored, "state": 8 * stored}


def _count(model: MoECausalLM, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    parameters: list[torch.Tensor] = list(model.parameters())
    states = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    groups = {"weights": parameters, "gradients": [p.grad for p in parameters if p.grad is not None], "state": states}
    return {
        name: sum(local_part(tensor).numel() * tensor.element_size() for tensor in tensors)
        for name, tensors in groups.items()
    }


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now


# ---- recording -------------------------------------------------------------------------------------------------------

_C10D = torch.ops.c10d
#: Operation to kind, position of the group among its arguments, and position of the larger buffer.
_OPERATIONS = {
    _C10D.allreduce_.default: ("all-reduce", 1, 0),
    _C10D._allgather_base_.default: ("all-gather", 2, 0),
    _C10D._reduce_scatter_base_.default: ("reduce-scatter", 2, 1),
    _C10D.alltoall_base_.default: ("all-to-all", 2, 1),
    _C10D.broadcast_.default: ("broadcast", 1, 0),
    _C10D.send.default: ("send", 1, 0),
    _C10D.recv_.default: ("recv", 1, 0),
}


class Recorder(TorchDispatchMode):
    """Records every collective, and supplies the answers of ranks that do not exist.

    Args:
        fold: The fold.

    Attributes:
        messages: Number of calls of each collective, without groups of one rank.
        live: Memory of the tensors that exist during recording.
    """

    def __init__(self, fold: Fold) -> None:
        super().__init__()
        self.fold = fold
        self.messages: Counter[Message] = Counter()
        self.live = LiveMemory()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Handles one operation."""
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 0  # for example faults counted over all ranks
        result = func(*args, **(kwargs or {}))
        self.live.see(result)
        if func in _OPERATIONS:
            self._record(func, args)
        elif func.namespace == "c10d" and func is not _C10D.barrier.default:
            raise NotImplementedError(f"{func} is a collective that the recorder does not know; add it to _OPERATIONS.")
        return result

    def _record(self, func: Any, args: Any) -> None:
        kind, group_at, buffer_at = _OPERATIONS[func]
        group = dist.ProcessGroup.unbox(args[group_at])
        ranks = tuple(dist.get_process_group_ranks(group))
        buffers = args[buffer_at] if isinstance(args[buffer_at], (list, tuple)) else [args[buffer_at]]
        if kind in ("send", "recv"):
            here, there = dist.get_rank(), ranks[args[2]]
            ranks = (here, there) if kind == "send" else (there, here)
        if len(ranks) == 1:
            return
        self.messages[Message(kind, ranks, sum(b.numel() * b.element_size() for b in buffers))] += 1
        if kind == "all-reduce" and not isinstance(buffers[0], FakeTensor):
            # Ranks that share this rank's rows contribute the same, and ranks of other replicas nothing.
            buffers[0].mul_(len(ranks) // self.fold.dp)


class _Balanced(AllToAllDispatcher):
    """Sends equally many rows to every expert, since a router without numbers makes no choice."""

    def _sizes_of_exchange(self, choices: SortedChoices) -> tuple[list[list[int]], list[Tensor]]:
        sources, peers, local = self.ep.size, self.etp.size, self.local_experts
        if self.etp_ep.size > 1:
            comm.all_gather_raw(choices.counts_E, self.etp_ep)
        rows = choices.slot_S.shape[0]
        if rows % self.num_experts:
            raise InputError(f"{rows} rows of a rank do not spread evenly over {self.num_experts} experts.")
        each = rows // self.num_experts
        even = [local * each] * sources
        return [[*even, *even, *[rows] * peers]], [choices.counts_E.new_full((peers, sources, local), each)]

    def _plans(
        self, choices: SortedChoices, sizes: list[list[int]], counts: list[Tensor], tokens: int
    ) -> tuple[list[ChunkPlan], Copies]:
        plans, copies = super()._plans(choices, sizes, counts, tokens)
        computed = sum(plans[0].arrived) // self.local_experts
        return [replace(plans[0], counts=[computed] * self.local_experts)], copies


@contextmanager
def _real_batches(model: MoECausalLM) -> Iterator[None]:
    """Reads batches with real (small) tensors, and gives pipeline stages their shapes without communication."""
    with mock.patch.object(causal_lm, "read_batch", _for_real(causal_lm.read_batch)):
        if isinstance(pipeline := model.pipeline, Pipeline):
            network = pipeline.network
            network.read, pipeline._agree = _for_real(network.read), _for_real(pipeline._agree)  # type: ignore[method-assign]
            runner = pipeline.runner
            make = runner._make_schedule
            runner._make_schedule = lambda *args: _static(make(*args))  # type: ignore[method-assign]
        yield


def _for_real(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return run


def _static(schedule: Any) -> Any:
    """Tells stages that all know the shapes; from torch 2.12 on, stages vote on this."""
    try:
        from torch.distributed.pipelining.stage import InferenceMode
    except ImportError:
        return schedule
    for stage in getattr(schedule, "_stages", None) or [schedule._stage]:
        stage._inference_mode = InferenceMode.STATIC
    schedule._warmup_p2p = lambda *_, **__: None
    return schedule

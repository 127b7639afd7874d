# SPDX-License-Identifier: Apache-2.0
"""The engine of a pipeline: runs stages by a schedule and keeps the gradients that it computed.

Lightning calls ``training_step``, then ``zero_grad``, then ``backward``; gradients that a schedule left behind would be
wiped. So a call puts the gradients that are there aside, runs the schedule, takes what it made and puts the old ones
back, and returns the loss as the output of an autograd function that has the parameters as inputs and *returns* the
gradients it kept, times whatever arrives. By the chain rule that is exact for anything done with the loss.

FSDP2 reduces inside the schedule, once a call; sums over tp, over data ranks where weights are replicated, and over the two
stages that hold a tied weight, are made after backward as always (:class:`~.gradients.GradientSum`), since these gradients
enter there like any others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_moefold.balance.fast import CopyCounter
from lightning_moefold.mesh import FoldedMesh
from lightning_moefold.modules.base import parallel_roots
from lightning_moefold.modules.moe import MoELayer
from lightning_moefold.parallel.gradients import like, local_part
from lightning_moefold.parallel.pipeline.paired_passes import pair_passes
from lightning_moefold.parallel.pipeline.plan import PipelinePlan

if TYPE_CHECKING:
    from lightning_moefold.parallel.pipeline.stage import Stage

_CLASSES = {
    "gpipe": "ScheduleGPipe",
    "1f1b": "Schedule1F1B",
    "interleaved_1f1b": "ScheduleInterleaved1F1B",
    "interleaved_zero_bubble": "ScheduleInterleavedZeroBubble",
    "zbv": "ScheduleZBVZeroBubble",
    "dualpipev": "ScheduleDualPipeV",
}
#: Parameters and the gradients that a schedule made.
Kept = list[tuple[nn.Parameter, Tensor | None]]


@dataclass(frozen=True)
class Wire:
    """A tensor that travels from stage to stage with every micro-batch."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def empty(self, device: torch.device, *, requires_grad: bool = False) -> Tensor:
        """Room for it."""
        return torch.empty(self.shape, dtype=self.dtype, device=device, requires_grad=requires_grad)


class ScheduleRunner:
    """Runs the stages of this rank, together with all ranks of the pipeline.

    Args:
        network: Of which this rank holds the stages, cut down to them.
        mesh: The folded mesh.
        plan: Schedule and cut.
        stages: In the order of the model; each computes what its ``call`` says when it is called with the tensors of the
            stage before.

    Attributes:
        watch: Makes a context around torch's schedule, in which it runs; the pipeline timeline sets it.
    """

    def __init__(self, network: nn.Module, mesh: FoldedMesh, plan: PipelinePlan, stages: Sequence[Stage]) -> None:
        self.mesh, self.plan, self.stages = mesh, plan, stages
        self.count = mesh.fold.pp * plan.chunks
        self._network = network
        self.watch: Callable[[Any], AbstractContextManager[Any]] = nullcontext
        self._schedule: Any = None
        self._schedule_key: tuple[Any, ...] = ()

    def use(self, plan: PipelinePlan) -> None:
        """Goes on by another schedule, whose stages lie where these do."""
        if plan.schedule != self.plan.schedule:
            self._schedule_key = ()
        self.plan = plan

    def _rank_of(self, stage: int) -> int:
        pp = self.mesh.axis("pp")
        return pp.ranks[self.plan.owner(stage, pp.size)]

    def from_last(self, mine: Tensor | None, shape: Wire | None, device: torch.device) -> Tensor:
        """Broadcasts ``mine`` from the rank of the last stage to every rank of the pipeline. Collective over them.

        ``shape`` is None where only that rank knows it.
        """
        group, source = self.mesh.axis("pp").group, self._rank_of(self.count - 1)
        if shape is None:
            about = [None if mine is None else Wire(tuple(mine.shape), mine.dtype)]
            dist.broadcast_object_list(about, src=source, group=group)
            shape = about[0]
        assert shape is not None
        whole = shape.empty(device) if mine is None else mine.contiguous()
        dist.broadcast(whole.view(torch.uint8) if whole.dtype == torch.bool else whole, src=source, group=group)
        return whole

    def _release_gathered_weights(self) -> None:
        """So that the network's parameters are this rank's pieces."""
        for _, root in parallel_roots(self._network):
            root.release_gathered_weights()

    @contextmanager
    def working_on(self, call: Any) -> Iterator[None]:
        """A context in which the stages of this rank know what to do."""
        for stage in self.stages:
            stage.call = call
        try:
            yield
        finally:
            for stage in self.stages:
                stage.call = None

    @contextmanager
    def counters_kept(self) -> Iterator[None]:
        """Tokens and calls are counted once, however often tokens pass."""
        layers = [m for m in self._network.modules() if isinstance(m, MoELayer)]
        found = (c for m in layers for c in (m.load_E, m.dropped_E, m.gate.counts_E, m.gate.call))
        counters = [(counter, counter.clone()) for counter in found if counter is not None]
        copies = [(layer, layer.copies) for layer in layers]
        for layer in layers:
            layer.copies = CopyCounter()
        try:
            yield
        finally:
            for counter, before in counters:
                counter.copy_(before)
            for layer, before_copies in copies:
                layer.copies = before_copies

    # ---- forward and backward ----------------------------------------------------------------------------------

    def train(self, call: Any, microbatches: int, wires: tuple[Wire, ...], device: torch.device) -> Kept:
        """Forward and backward of all micro-batches; gradients of earlier stay as they are."""
        self._release_gathered_weights()
        parameters = [p for p in self._network.parameters() if p.requires_grad]
        aside = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        numbers = torch.arange(microbatches)
        try:
            schedule = self._prepare(microbatches, wires, device)
            with self.working_on(call), self.watch(schedule):
                schedule.step(microbatch=numbers, target=numbers, return_outputs=False)
            self._release_gathered_weights()
            return [(p, p.grad) for p in parameters]
        finally:
            for parameter, grad in zip(parameters, aside, strict=True):
                parameter.grad = grad

    def _prepare(self, microbatches: int, wires: tuple[Wire, ...], device: torch.device) -> Any:
        """The schedule of torch for these shapes; the one of the last call if they are the same.

        Shapes are given, never inferred: inference would run the model on garbage and spoil the load counts.
        """
        key = (microbatches, wires)
        if key != self._schedule_key:
            self._schedule, self._schedule_key = self._make_schedule(microbatches, wires, device), key
        return self._schedule

    def _make_schedule(self, microbatches: int, wires: tuple[Wire, ...], device: torch.device) -> Any:
        from torch.distributed import pipelining

        between = tuple(wire.empty(device, requires_grad=True) for wire in wires)
        scalar = torch.empty((), dtype=torch.float64, device=device, requires_grad=True)
        stages = [
            pipelining.PipelineStage(
                stage, stage.index, self.count, device, input_args=() if stage.is_first else between,
                output_args=(scalar,) if stage.is_last else between, group=self.mesh.axis("pp").group,
            )
            for stage in self.stages
        ]  # fmt: skip
        kind = getattr(pipelining, _CLASSES[self.plan.schedule])
        single = self.plan.schedule in ("gpipe", "1f1b")
        schedule = kind(
            stages[0] if single else stages, microbatches, loss_fn=lambda output, _: output, scale_grads=False
        )
        if self.plan.schedule == "dualpipev" and self.mesh.axis("etp_ep").size > 1:
            pair_passes(schedule)
        return schedule

    # ---- forward alone -----------------------------------------------------------------------------------------

    @torch.inference_mode(mode=False)  # what FSDP2 gathers would serve no training after it
    @torch.no_grad()
    def evaluate(self, call: Any, microbatches: int, wires: tuple[Wire, ...], device: torch.device) -> Kept:
        """All micro-batches through the first stage of every rank, then through the second.

        On NCCL, what a rank sends and receives in a group runs in the order in which it was asked for, and a send is done
        when the other side receives. From the last rank back to the first, micro-batches therefore travel all together,
        between one turn of the pipeline and the next; asked for one by one, each of the two would wait for the other.

        Returns:
            No gradients.
        """
        pp, here = self.mesh.axis("pp"), {stage.index for stage in self.stages}
        passed: dict[tuple[int, int], tuple[Tensor, ...]] = {}
        sends: list[tuple[Any, Tensor]] = []

        def receive(stage: Stage) -> tuple[Tensor, ...]:
            received = tuple(wire.empty(device) for wire in wires)
            for tensor in received:
                dist.recv(tensor, self._rank_of(stage.index - 1), group=pp.group)
            return received

        def send(stage: Stage, output: tuple[Tensor, ...]) -> None:
            after = self._rank_of(stage.index + 1)
            sends.extend((dist.isend(x, after, group=pp.group), x) for x in output)

        with self.working_on(call):
            for stage in self.stages:
                if stage.index % pp.size == 0 and not stage.is_first and stage.index - 1 not in here:
                    passed |= {(stage.index - 1, i): receive(stage) for i in range(microbatches)}
                around: list[tuple[Tensor, ...]] = []
                for i in range(microbatches):
                    received = passed.pop((stage.index - 1, i), ())
                    if not stage.is_first and not received:
                        received = receive(stage)
                    output = stage(*received, microbatch=torch.tensor([i]))
                    if stage.index + 1 in here:
                        passed[stage.index, i] = output
                    elif not stage.is_last and (stage.index + 1) % pp.size == 0:
                        around.append(output)
                    elif not stage.is_last:
                        send(stage, output)
                for output in around:
                    send(stage, output)
        for work, _ in sends:
            work.wait()
        return []


def differentiable(value: Tensor, kept: Kept, factor: float) -> Tensor:
    """``value`` as a function of the parameters, with ``factor`` times the gradients kept."""
    anchor = torch.zeros((), device=value.device, requires_grad=True)
    return _KeptGradients.apply(value, factor, [g for _, g in kept], anchor, *[p for p, _ in kept])


def value_only(value: Tensor, hint: str) -> Tensor:
    """``value`` as something that cannot be differentiated; whoever tries is told ``hint``."""
    return _Detached.apply(value, torch.zeros((), device=value.device, requires_grad=True), hint)


class _KeptGradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: Tensor, factor: float, kept: list[Tensor | None], anchor: Tensor, *parameters: Tensor
    ) -> Tensor:
        ctx.factor, ctx.kept, ctx.parameters = factor, kept, parameters
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        factor = grads[0] * ctx.factor
        pairs = zip(ctx.parameters, ctx.kept, strict=True)
        scaled = [None if g is None else like(p, local_part(g) * factor.to(g.dtype)) for p, g in pairs]
        return None, None, None, None, *scaled


class _Detached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor, hint: str) -> Tensor:
        ctx.hint = hint
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(f"under pipeline parallelism {ctx.hint}")

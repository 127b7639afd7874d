# SPDX-License-Identifier: Apache-2.0
"""A language model in a pipeline: one call runs the whole schedule, forward and backward, over the micro-batches.

Lightning calls ``training_step``, then ``zero_grad``, then ``backward``; gradients that a schedule left behind would be
wiped. So a call puts the gradients that are there aside, runs the schedule, takes what it made and puts the old ones
back, and returns the loss as the output of an autograd function that has the parameters as inputs and *returns* the
gradients it kept, times whatever arrives. By the chain rule that is exact for anything done with the loss.

FSDP2 reduces inside the schedule, once a call; sums over tp, and over data ranks where weights are replicated, are made
after backward as always (:class:`~.gradients.GradientSum`), since these gradients enter there like any others.

Data errors are agreed on before the schedule, in the collective that counts the labels: a rank that raised alone would
leave the others waiting in it.

Where balance is asked for over the whole batch, the gradient of no micro-batch is known before all of them have been routed:
they pass forward once more, before the schedule.

Legend: M micro-batches, C tokens of the longest, D hidden size, L layers, S rows of a routing table, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_moefold import comm
from lightning_moefold.mesh import FoldedMesh
from lightning_moefold.models import MoECausalLM
from lightning_moefold.models.batch import BatchError, CausalLMBatch, check_shapes, read_batch, stand_in
from lightning_moefold.models.causal_lm import CausalLMOutput, LossFunction
from lightning_moefold.models.losses import Losses, check_faults
from lightning_moefold.models.router_losses import RouterLosses
from lightning_moefold.modules.base import wide
from lightning_moefold.parallel.gradients import like, local_part
from lightning_moefold.parallel.stage_module import Job, Stage
from lightning_moefold.parallel.stages import PipelinePlan

_CLASSES = {
    "gpipe": "ScheduleGPipe",
    "1f1b": "Schedule1F1B",
    "interleaved_1f1b": "ScheduleInterleaved1F1B",
    "interleaved_zero_bubble": "ScheduleInterleavedZeroBubble",
    "zbv": "ScheduleZBVZeroBubble",
    "dualpipev": "ScheduleDualPipeV",
}
_PRIME = 1048573  # sums of squares of numbers below it are exact in float64
_Kept = list[tuple[nn.Parameter, Tensor | None]]


@dataclass
class _Totals:
    """Mean loss over the labels of all ranks, the weight it was divided by (1 for none), and the losses of routers."""

    language: Tensor
    weight: float
    auxiliary: Tensor | None
    z: Tensor | None


class _Agreed(NamedTuple):
    """What all ranks know before the schedule.

    Args:
        labels: Weight of all labels on all ranks; 1 where there are none.
        short: Whether a rank has fewer rows than micro-batches.
        sizes: See :class:`~.stage_module.Job`.
    """

    labels: float
    short: bool
    sizes: tuple[float, float]


class Pipeline:
    """Runs a model that is spread over pipeline ranks.

    Args:
        model: Cut down to what this rank holds.
        mesh: The folded mesh.
        plan: Schedule and cut.
        stages: Of this rank, in the order of the model.
    """

    def __init__(self, model: MoECausalLM, mesh: FoldedMesh, plan: PipelinePlan, stages: list[Stage]) -> None:
        self.mesh, self.plan, self.stages = mesh, plan, stages
        self._model = model
        self._count = mesh.fold.pp * plan.chunks
        self._schedule: Any = None
        self._schedule_key: tuple[Any, ...] = ()

    # ---- a call of the model -----------------------------------------------------------------------------------

    def run(
        self,
        tensors: Mapping[str, Any],
        loss_fn: LossFunction | None,
        gather_logits: bool,
        extras: Mapping[str, Any],
    ) -> CausalLMOutput:
        """What :meth:`.MoECausalLM.forward` does where there are several stages. Collective over all ranks.

        Args:
            tensors: Its tensor arguments by name.
            loss_fn: Runs on the last stage, on one micro-batch at a time.
            gather_logits: Send whole logits to every stage.
            extras: Of ``loss_fn``; tensors with an entry for each row of the batch are cut like the batch.
        """
        labelled = tensors["labels"] is not None
        training = labelled and torch.is_grad_enabled()
        wants_logits = gather_logits or (not labelled and self.mesh.tp.size == 1)
        keep_all, m = gather_logits or loss_fn is not None, self._model.num_microbatches
        mode = 8 * training + 4 * labelled + 2 * gather_logits + (loss_fn is not None)
        batches, parts = self._read(tensors, extras, keep_all, m)
        agreed = self._agree(batches, mode)
        if agreed.short and m > 1:  # a rank has fewer rows than micro-batches, as in the last batch of a prediction
            batches, parts = self._read(tensors, extras, keep_all, 1)
        tokens = max(b.sequence.tokens + b.sequence.padding for b in batches)
        capacity = tokens // self.mesh.tp.size
        job = Job(batches, loss_fn, parts, wants_logits, capacity, 1 / agreed.labels, agreed.sizes)
        groups, call = max(b.sequence.num_groups for b in batches), self._model.next_call()
        for batch in batches:
            batch.sequence.num_groups, batch.sequence.call = groups, call
        if training and batches[0].sequence.wants_routing and (loss_fn is not None or self._balances_batch(m)):
            # The weight that a loss_fn finds decides how its gradients compare with those of the losses of routers.
            with self._counters_kept():
                self._run_forward(job)
            job.scale = 1 / self._totals(job).weight
        kept = self._run_schedule(job) if training else self._run_forward(job)
        totals = self._totals(job)
        output = self._output(totals, labelled)
        if wants_logits:
            output = output._replace(logits=self._logits(job, gather_logits))
        return self._differentiable(output, kept, 1 / (job.scale * totals.weight)) if training else output

    def _balances_batch(self, m: int) -> bool:
        config = self._model.config
        return m > 1 and config.wants_aux_loss and config.aux_loss == "global_batch"

    def _read(
        self, tensors: Mapping[str, Any], extras: Mapping[str, Any], keep_all: bool, m: int
    ) -> tuple[list[CausalLMBatch], list[dict[str, Any]]]:
        """``m`` micro-batches; in place of what cannot be read, something whose fault all ranks will hear of."""
        model, input_ids = self._model, tensors["input_ids"]
        axes = model.batch_axes()
        try:
            check_shapes(**tensors)
            rows = input_ids.shape[0]
            if rows < m or m == 1:
                return [read_batch(model.config, axes, m, keep_all=keep_all, **tensors)], [dict(extras)]
            cut = _cut({k: v if v is None or v.dim() == 2 else [v] * m for k, v in tensors.items()}, rows, m)
            before = list(accumulate([part["input_ids"].shape[0] for part in cut], initial=0))
            batches = [
                read_batch(model.config, axes, 1, keep_all=keep_all, rows_before=n, **part)
                for n, part in zip(before, cut, strict=False)
            ]
            return batches, _cut(extras, rows, m)
        except ValueError as error:
            return [stand_in(model.config, axes, 1, input_ids.device, error)], [dict(extras)]

    def _agree(self, batches: list[CausalLMBatch], mode: int) -> _Agreed:
        """What all ranks must know before the schedule, once everybody's data is known to be sound.

        Ranks of one data replica must be given the same batch and arguments, see :mod:`..models.losses`; here their
        stages would wait for each other forever.
        """
        mesh, faults = self.mesh, torch.stack([b.faults for b in batches]).sum(0)
        sizes = torch.stack([b.sizes for b in batches]).sum(0)
        number = torch.full((), mode, device=faults.device)
        for batch in batches:
            number = (number * 31 + batch.fingerprint + 17 * batch.sequence.rows) % _PRIME
        slots = faults.new_zeros(mesh.fold.dp, 2)
        slots[mesh.place["dp"]] = torch.stack([number, number * number]).double()
        weight = torch.stack([b.weight_N[b.labelled_index].double().sum() for b in batches]).sum()
        if mesh.tp.index or mesh.place["pp"]:  # what the first of those who share a batch says counts for all of them
            weight = torch.zeros_like(weight)
        if mesh.tp.index or mesh.place["pp"] or mesh.place["cp"]:
            faults[:3] = 0
            sizes[1] = 0
        if mesh.place["pp"]:
            sizes[0] = 0
        short = faults.new_tensor([batches[0].sequence.rows < batches[0].sequence.num_microbatches])
        mine = torch.cat([weight[None], short, faults, sizes, slots.flatten()])
        totals = comm.all_reduce_raw(mine, mesh.world).cpu()
        check_faults(totals[2:6], batches[0].error, self._model.config.vocab_size, self._model.num_microbatches)
        first, second = totals[8:].view(-1, 2).unbind(1)
        if bool((second * (mesh.fold.tp * mesh.fold.cp * mesh.fold.pp) != first * first).any()):
            raise BatchError(
                "ranks of a tensor, context or pipeline parallel group were given different batches or arguments, but they "
                "compute one batch together; shard the data by strategy.dp_rank and strategy.dp_size, and shuffle with a seed "
                "that all share."
            )
        return _Agreed(float(totals[0]) or 1.0, bool(totals[1]), (float(totals[6]) or 1.0, float(totals[7]) or 1.0))

    def _totals(self, job: Job) -> _Totals:
        """What the last stage found, on all ranks; the same bits on each.

        Raises:
            Exception: What a ``loss_fn`` raised; on other ranks, that it did.
        """
        mesh, device = self.mesh, job.batches[0].faults.device
        mine = torch.zeros(5, dtype=torch.float64, device=device)
        if job.sums and mesh.tp.index == 0:
            mine[:2] = torch.stack(list(job.sums.values())).sum(0)
        if job.routing:
            mine[2:4] = torch.stack(list(job.routing.values())).sum(0)
        mine[4] = job.error is not None
        total = comm.all_reduce_raw(mine, mesh.world)
        weight = 1.0
        if job.loss_fn is not None:
            weight = float(total[1]) or 1.0
            if job.error is not None:
                raise job.error
            if bool(total[4]):
                raise RuntimeError("loss_fn failed on another rank, which holds the last pipeline stage and says why.")
        else:
            weight = 1 / job.scale
        config = self._model.config
        auxiliary, z = total[2] if config.wants_aux_loss else None, total[3] if config.wants_z_loss else None
        return _Totals(total[0] / weight, weight, auxiliary, z)

    def _output(self, totals: _Totals, labelled: bool) -> CausalLMOutput:
        language, *routers = (
            None if value is None else value.to(wide(self._dtype))
            for value in (totals.language if labelled else None, totals.auxiliary, totals.z)
        )
        return self._model._output(Losses(language, *routers), None, labelled)

    def _differentiable(self, output: CausalLMOutput, kept: _Kept, factor: float) -> CausalLMOutput:
        assert output.loss is not None
        # A loss means the mean over data ranks, whose gradients are summed (modules/balance.py); this is a global value.
        factor *= self.mesh.dp_cp.size
        anchor = torch.zeros((), device=output.loss.device, requires_grad=True)
        loss = _KeptGradients.apply(output.loss, factor, [g for _, g in kept], anchor, *[p for p, _ in kept])
        alone = output.aux_loss is None and output.z_loss is None
        detached = {
            name: _Detached.apply(value, anchor) for name, value in output._asdict().items() if value is not None
        }
        return output._replace(**{**detached, "loss": loss, "lm_loss": loss if alone else detached["lm_loss"]})

    def _logits(self, job: Job, gather: bool) -> Tensor | None:
        mine = torch.cat([job.logits[i] for i in sorted(job.logits)]) if job.logits else None
        if not gather:
            return mine
        pp, rows = self.mesh.axis("pp"), sum(b.sequence.rows for b in job.batches)
        if mine is None:
            shape = (rows, job.batches[0].true_length, self._model.config.vocab_size)
            mine = torch.empty(shape, dtype=self._dtype, device=job.batches[0].faults.device)
        mine = mine.contiguous()
        dist.broadcast(mine, src=pp.ranks[self.plan.owner(self._count - 1, pp.size)], group=pp.group)
        return mine

    @property
    def _dtype(self) -> torch.dtype:
        """Of the hidden states."""
        return self._model.compute_dtype or next(self._model.parameters()).dtype

    # ---- forward and backward ----------------------------------------------------------------------------------

    @contextmanager
    def _working_on(self, job: Job) -> Iterator[None]:
        for stage in self.stages:
            stage.job = job
        try:
            yield
        finally:
            for stage in self.stages:
                stage.job = None

    @contextmanager
    def _counters_kept(self) -> Iterator[None]:
        """Tokens are counted once, however often they pass."""
        layers = self._model.moe_layers().values()
        counters = [(c, c.clone()) for layer in layers for c in (layer.load_E, layer.dropped)]
        yield
        for counter, before in counters:
            counter.copy_(before)

    def _run_schedule(self, job: Job) -> _Kept:
        model = self._model
        model.release_gathered_weights()
        parameters = [p for p in model.parameters() if p.requires_grad]
        aside = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        numbers = torch.arange(len(job.batches))
        try:
            schedule = self._prepare(job)
            with self._working_on(job):
                schedule.step(microbatch=numbers, target=numbers, return_outputs=False)
            model.release_gathered_weights()
            self._sum_tied()
            return [(p, p.grad) for p in parameters]
        finally:
            for parameter, grad in zip(parameters, aside, strict=True):
                parameter.grad = grad

    def _prepare(self, job: Job) -> Any:
        """The schedule of torch for the shape of this batch; the one of the last call if the shape is the same.

        Shapes are given, never inferred: inference would run the model on garbage and spoil the load counts.
        """
        m, tables = len(job.batches), self._tables_shape(job)
        key = (job.capacity, tables, m, self._dtype)
        if key != self._schedule_key:
            self._schedule, self._schedule_key = self._make_schedule(job.capacity, tables, m), key
        return self._schedule

    def _tables_shape(self, job: Job) -> tuple[int, int, int] | None:
        """Of the routing tables that travel with the hidden states, if any do."""
        if not job.batches[0].sequence.wants_routing:
            return None
        return RouterLosses(self._model.config, self.mesh).shape(job.groups)

    def _make_schedule(self, capacity: int, tables: tuple[int, int, int] | None, m: int) -> Any:
        from torch.distributed import pipelining

        config, pp = self._model.config, self.mesh.axis("pp")
        device = next(self._model.parameters()).device
        hidden = torch.empty(capacity, config.hidden_size, dtype=self._dtype, device=device, requires_grad=True)
        between = [hidden]
        if tables is not None:
            between.append(torch.empty(tables, dtype=torch.float64, device=device, requires_grad=True))
        scalar = torch.empty((), dtype=torch.float64, device=device, requires_grad=True)
        stages = [
            pipelining.PipelineStage(
                stage, stage.index, self._count, device, input_args=() if stage.is_first else tuple(between),
                output_args=(scalar,) if stage.is_last else tuple(between), group=pp.group,
            )
            for stage in self.stages
        ]  # fmt: skip
        kind = getattr(pipelining, _CLASSES[self.plan.schedule])
        single = self.plan.schedule in ("gpipe", "1f1b")
        return kind(stages[0] if single else stages, m, loss_fn=lambda output, _: output, scale_grads=False)

    @torch.no_grad()
    def _sum_tied(self) -> None:
        """The embedding's gradient as such, on the first stage, and as the head, on the last, are parts of one."""
        embedding, pp = self._model.model.embed_tokens, self.mesh.axis("pp")
        if not self._model.config.tie_word_embeddings or embedding is None or not embedding.weight.requires_grad:
            return
        weight = embedding.weight
        ends = [pp.ranks[self.plan.owner(stage, pp.size)] for stage in (0, self._count - 1)]
        if weight.grad is None:
            weight.grad = like(weight, torch.zeros_like(local_part(weight)))
        mine = local_part(weight.grad)
        sent, other = mine.contiguous(), torch.empty_like(mine, memory_format=torch.contiguous_format)
        peer = ends[self.mesh.rank == ends[0]]
        ops = [dist.P2POp(dist.isend, sent, peer, pp.group), dist.P2POp(dist.irecv, other, peer, pp.group)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        mine.add_(other)

    @torch.no_grad()
    def _run_forward(self, job: Job) -> _Kept:
        """All micro-batches through the first stage of every rank, then through the second."""
        pp, here = self.mesh.axis("pp"), {stage.index for stage in self.stages}
        passed: dict[tuple[int, int], tuple[Tensor, ...]] = {}
        sends: list[tuple[Any, Tensor]] = []
        with self._working_on(job):
            for stage in self.stages:
                before, after = (pp.ranks[self.plan.owner(i, pp.size)] if 0 <= i < self._count else -1
                                 for i in (stage.index - 1, stage.index + 1))  # fmt: skip
                # From the last rank back to the first: only after all that the last one has to receive, or each of a pair
                # of ranks might wait for the other to receive first.
                around: list[Tensor] = []
                for i in range(len(job.batches)):
                    received: tuple[Tensor, ...] = ()
                    if stage.index - 1 in here:
                        received = passed.pop((stage.index - 1, i))
                    elif not stage.is_first:
                        received = self._receive(job, before)
                    output = stage(*received, microbatch=torch.tensor([i]))
                    if stage.index + 1 in here:
                        passed[stage.index, i] = output
                    elif not stage.is_last and (stage.index + 1) % pp.size == 0:
                        around += output
                    elif not stage.is_last:
                        sends += [(dist.isend(x, after, group=pp.group), x) for x in output]
                sends += [(dist.isend(x, after, group=pp.group), x) for x in around]
            for stage in self.stages:
                stage.balance_whole_batch()
        for work, _ in sends:
            work.wait()
        return []

    def _receive(self, job: Job, source: int) -> tuple[Tensor, ...]:
        config, device = self._model.config, job.batches[0].faults.device
        tensors = [torch.empty(job.capacity, config.hidden_size, dtype=self._dtype, device=device)]
        if (tables := self._tables_shape(job)) is not None:
            tensors.append(torch.empty(tables, dtype=torch.float64, device=device))
        for tensor in tensors:
            dist.recv(tensor, source, group=self.mesh.axis("pp").group)
        return tuple(tensors)


@contextmanager
def spare_parameters(models: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, a model whose stages here are all frozen has a parameter without elements: optimizers refuse to have none."""
    frozen = [m for m in models if isinstance(m, MoECausalLM) and m.pipeline is not None]
    frozen = [m for m in frozen if not any(p.requires_grad for p in m.parameters())]
    for model in frozen:
        model.register_parameter("pipeline_spare", nn.Parameter(torch.empty(0, device=next(model.parameters()).device)))
    try:
        yield
    finally:
        for model in frozen:
            del model.pipeline_spare


def _cut(values: Mapping[str, Any], rows: int, m: int) -> list[dict[str, Any]]:
    """Tensors of ``rows`` rows in blocks, lists entry by entry, all else to everybody."""
    columns = {
        name: value if isinstance(value, list)
        else value.tensor_split(m) if isinstance(value, Tensor) and value.dim() and value.shape[0] == rows
        else [value] * m
        for name, value in values.items()
    }  # fmt: skip
    return [{name: column[i] for name, column in columns.items()} for i in range(m)]


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
    def forward(ctx: Any, value: Tensor, anchor: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "under pipeline parallelism only output.loss can be differentiated: its gradients were made during the call, and "
            "logits, lm_loss and aux_loss are values; compute your loss in a loss_fn, or detach() them."
        )

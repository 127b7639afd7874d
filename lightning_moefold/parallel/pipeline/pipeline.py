# SPDX-License-Identifier: Apache-2.0
"""A language model in a pipeline: one call runs the whole schedule, forward and backward, over the micro-batches.

The engine is :mod:`.schedule`, which networks of the user's own (:mod:`.network`) share.

Data errors are agreed on before the schedule, in the collective that counts the labels: a rank that raised alone would
leave the others waiting in it.

Where balance is asked for over the whole batch, the gradient of no micro-batch is known before all of them have been routed:
they pass forward once more, before the schedule.

Legend: M micro-batches, C tokens of the longest, D hidden size, L layers, S rows of a routing table, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from lightning_moefold import comm
from lightning_moefold.agreement import PRIME, check_same_batch, same_batch_slots
from lightning_moefold.errors import PeerError
from lightning_moefold.mesh import FoldedMesh
from lightning_moefold.models import MoECausalLM
from lightning_moefold.models.batch import CausalLMBatch, check_shapes, empty_batch, read_batch, stand_in
from lightning_moefold.models.causal_lm import CausalLMOutput, LossFunction
from lightning_moefold.models.losses import Factors, Losses, StepLabels, check_faults
from lightning_moefold.models.router_losses import RouterLosses
from lightning_moefold.modules.base import wide
from lightning_moefold.parallel.pipeline.engine import Kept, ScheduleRunner, Wire, differentiable, value_only
from lightning_moefold.parallel.pipeline.plan import PipelinePlan
from lightning_moefold.parallel.pipeline.stage import Job, Stage
from lightning_moefold.parallel.settings import Settings

_VALUES = (
    "only output.loss can be differentiated: its gradients were made during the call, and logits, lm_loss, aux_loss and z_loss "
    "are values; compute your loss in a loss_fn, or detach() them."
)


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
        sizes: See :class:`~.stage.Job`.
        factors: By what gradients are multiplied.
    """

    labels: float
    sizes: tuple[float, float, float]
    factors: Factors


class Pipeline:
    """Runs a model that is spread over pipeline ranks.

    Args:
        model: Cut down to what this rank holds.
        mesh: The folded mesh.
        plan: Schedule and cut.
        stages: Of this rank, in the order of the model.
    """

    def __init__(self, model: MoECausalLM, mesh: FoldedMesh, plan: PipelinePlan, stages: list[Stage]) -> None:
        self.mesh, self.stages = mesh, stages
        self._model = model
        self.runner = ScheduleRunner(model, mesh, plan, stages)

    def use(self, settings: Settings) -> None:
        """Goes on under other settings."""
        self.runner.use(settings.plan)

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
        step = self._model.take_step_labels(tensors["labels"], loss_fn)
        agreed = self._agree(batches, mode, step)
        tokens = max(b.sequence.tokens + b.sequence.padding for b in batches)
        capacity = tokens // self.mesh.tp.size
        language, routers = agreed.factors
        job = Job(batches, loss_fn, parts, wants_logits, capacity, language / routers / agreed.labels, agreed.sizes)
        groups, call = max(b.sequence.num_groups for b in batches), self._model.next_call()
        for batch in batches:
            batch.sequence.num_groups, batch.sequence.call = groups, call
        if training and batches[0].sequence.wants_routing and (loss_fn is not None or self._balances_batch(m)):
            # The weight that a loss_fn finds decides how its gradients compare with those of the losses of routers.
            with self.runner.counters_kept():
                self._run(job, training=False)
            job.scale = language / routers / self._totals(job, agreed).weight
        kept = self._run(job, training)
        totals = self._totals(job, agreed)
        output = self._output(totals, labelled)
        if wants_logits:
            output = output._replace(logits=self._logits(job, gather_logits))
        # Of a loss_fn alone, the weight is known only now.
        factor = routers if step is not None else 1 / (job.scale * totals.weight)
        return self._differentiable(output, kept, factor) if training else output

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
            if m == 1:
                return [read_batch(model.config, axes, 1, keep_all=keep_all, **tensors)], [dict(extras)]
            cut = _cut({k: v if v is None or v.dim() == 2 else [v] * m for k, v in tensors.items()}, rows, m)
            before = list(accumulate([part["input_ids"].shape[0] for part in cut], initial=0))
            batches = [
                read_batch(model.config, axes, 1, keep_all=keep_all, rows_before=n, **part)
                if len(part["input_ids"])
                else empty_batch(model.config, axes, input_ids)
                for n, part in zip(before, cut, strict=False)
            ]
            return batches, _cut(extras, rows, m)
        except ValueError as error:
            return [stand_in(model.config, axes, 1, input_ids.device, error)], [dict(extras)]

    def _agree(self, batches: list[CausalLMBatch], mode: int, step: StepLabels | None) -> _Agreed:
        """What all ranks must know before the schedule, once everybody's data is known to be sound.

        Ranks of one data replica must be given the same batch and arguments, see :mod:`..models.losses`; here their
        stages would wait for each other forever.
        """
        mesh, faults = self.mesh, torch.stack([b.faults for b in batches]).sum(0)
        size_M2, m = torch.stack([b.sizes for b in batches]), self._model.num_microbatches
        sizes, tokens_M = size_M2.sum(0), F.pad(size_M2[:, 0], (0, m - len(batches)))
        number = torch.full((), mode, device=faults.device)
        for batch in batches:
            number = (number * 31 + batch.fingerprint + 17 * batch.sequence.rows) % PRIME
        slots = same_batch_slots(number, mesh)
        weight = torch.stack([b.weight_N[b.labelled_index].double().sum() for b in batches]).sum()
        if mesh.tp.index or mesh.place["pp"]:  # what the first of those who share a batch says counts for all of them
            weight = torch.zeros_like(weight)
        if mesh.tp.index or mesh.place["pp"] or mesh.place["cp"]:
            faults[:2] = 0
            sizes[1] = 0
        if mesh.place["pp"]:
            sizes[0] = 0
        ahead = weight.new_zeros(0) if step is None else step.numbers(weight.device)
        if mesh.tp.index or mesh.place["pp"] or mesh.place["cp"]:
            ahead = torch.zeros_like(ahead)
        mine = torch.cat([weight[None], faults, sizes, tokens_M, slots.flatten(), ahead])
        totals = comm.all_reduce_raw(mine, mesh.world).cpu()
        labels, faults, sizes, tokens_M, prints, ahead = totals.split([1, 3, 2, m, slots.numel(), len(ahead)])
        check_faults(faults, batches[0].error, self._model.config.vocab_size)
        check_same_batch(prints, mesh)
        counted, rows, filled = float(sizes[0]), float(sizes[1]), float((tokens_M > 0).sum())
        factors = Factors() if step is None else Factors.of(step, float(labels), *ahead.tolist())
        return _Agreed(float(labels) or 1.0, (counted or 1.0, rows or 1.0, filled or 1.0), factors)

    def _totals(self, job: Job, agreed: _Agreed) -> _Totals:
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
                raise PeerError("loss_fn failed on another rank, which holds the last pipeline stage and says why.")
        else:
            weight = agreed.labels
        config = self._model.config
        auxiliary, z = total[2] if config.wants_aux_loss else None, total[3] if config.wants_z_loss else None
        return _Totals(total[0] / weight, weight, auxiliary, z)

    def _output(self, totals: _Totals, labelled: bool) -> CausalLMOutput:
        language, *routers = (
            None if value is None else value.to(wide(self._dtype))
            for value in (totals.language if labelled else None, totals.auxiliary, totals.z)
        )
        return self._model._output(Losses(language, *routers), None, labelled)

    def _differentiable(self, output: CausalLMOutput, kept: Kept, factor: float) -> CausalLMOutput:
        assert output.loss is not None
        # A loss means the mean over data ranks, whose gradients are summed (modules/balance.py); this is a global value.
        loss = differentiable(output.loss, kept, factor * self.mesh.dp_cp.size)
        alone = output.aux_loss is None and output.z_loss is None
        values = {name: value_only(value, _VALUES) for name, value in output._asdict().items() if value is not None}
        return output._replace(**{**values, "loss": loss, "lm_loss": loss if alone else values["lm_loss"]})

    def _logits(self, job: Job, gather: bool) -> Tensor | None:
        mine = torch.cat([job.logits[i] for i in sorted(job.logits)]) if job.logits else None
        if not gather:
            return mine
        pp, rows = self.mesh.axis("pp"), sum(b.sequence.rows for b in job.batches if not b.is_empty)
        if mine is None:
            shape = (rows, job.batches[0].true_length, self._model.config.vocab_size)
            mine = torch.empty(shape, dtype=self._dtype, device=job.batches[0].faults.device)
        mine = mine.contiguous()
        dist.broadcast(mine, src=self.runner.last_rank, group=pp.group)
        return mine

    @property
    def _dtype(self) -> torch.dtype:
        """Of the hidden states."""
        return self._model.compute_dtype or next(self._model.parameters()).dtype

    def _run(self, job: Job, training: bool) -> Kept:
        config = self._model.config
        wires: tuple[Wire, ...] = (Wire((job.capacity, config.hidden_size), self._dtype),)
        if job.batches[0].sequence.wants_routing:
            wires += (Wire(RouterLosses(config, self.mesh).shape(job.groups), torch.float64),)
        run = self.runner.train if training else self.runner.evaluate
        kept = run(job, len(job.batches), wires, next(self._model.parameters()).device)
        if not training:
            with self.runner.working_on(job):
                for stage in self.stages:
                    stage.balance_whole_batch()
        return kept


def _cut(values: Mapping[str, Any], rows: int, m: int) -> list[dict[str, Any]]:
    """Tensors of ``rows`` rows in blocks, lists entry by entry, all else to everybody."""
    columns = {
        name: value if isinstance(value, list)
        else value.tensor_split(m) if isinstance(value, Tensor) and value.dim() and value.shape[0] == rows
        else [value] * m
        for name, value in values.items()
    }  # fmt: skip
    return [{name: column[i] for name, column in columns.items()} for i in range(m)]

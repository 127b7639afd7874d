# SPDX-License-Identifier: Apache-2.0
"""A language model in a pipeline: one call runs the whole schedule, forward and backward, over the micro-batches.

The engine is :mod:`.schedule`, which networks of the user's own (:mod:`.network`) share.

Data errors are agreed on before the schedule, in the collective that counts the labels: a rank that raised alone would
leave the others waiting in it.

Legend: M micro-batches, C tokens of the longest, D hidden size, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_moefold import comm
from lightning_moefold.mesh import FoldedMesh
from lightning_moefold.models import MoECausalLM
from lightning_moefold.models.batch import BatchAxes, CausalLMBatch, check_shapes, read_batch, stand_in
from lightning_moefold.models.causal_lm import CausalLMOutput, LossFunction
from lightning_moefold.models.losses import check_faults
from lightning_moefold.modules.base import wide
from lightning_moefold.parallel.agreement import PRIME, check_same_batch, same_batch_slots
from lightning_moefold.parallel.schedule import Kept, ScheduleRunner, Wire, differentiable, value_only
from lightning_moefold.parallel.stage_module import Job, Stage
from lightning_moefold.parallel.stages import PipelinePlan

_VALUES = (
    "only output.loss can be differentiated: its gradients were made during the call, and logits, lm_loss and aux_loss are "
    "values; compute your loss in a loss_fn, or detach() them."
)


@dataclass
class _Totals:
    """Mean loss over the labels of all ranks, the weight it was divided by (1 for none), and the auxiliary loss."""

    language: Tensor
    weight: float
    auxiliary: Tensor | None


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
        self.runner = ScheduleRunner(model, mesh, plan, stages)

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
        labels, short = self._agree(batches, mode)
        if short and m > 1:  # a rank has fewer rows than micro-batches, as in the last batch of a prediction
            batches, parts = self._read(tensors, extras, keep_all, 1)
        tokens = max(b.sequence.tokens + b.sequence.padding for b in batches)
        job = Job(batches, loss_fn, parts, wants_logits, tokens // self.mesh.tp.size, 1 / labels)
        if loss_fn is not None and training and batches[0].sequence.wants_routing:
            # The weight that a loss_fn finds decides how its gradients compare with those of the auxiliary loss.
            with self.runner.counters_kept():
                self._run(job, training=False)
            job.scale = 1 / self._totals(job).weight
        kept = self._run(job, training)
        totals = self._totals(job)
        output = self._output(job, totals, labelled)
        if wants_logits:
            output = output._replace(logits=self._logits(job, gather_logits))
        return self._differentiable(output, kept, 1 / (job.scale * totals.weight)) if training else output

    def _read(
        self, tensors: Mapping[str, Any], extras: Mapping[str, Any], keep_all: bool, m: int
    ) -> tuple[list[CausalLMBatch], list[dict[str, Any]]]:
        """``m`` micro-batches; in place of what cannot be read, something whose fault all ranks will hear of."""
        model, input_ids = self._model, tensors["input_ids"]
        axes = BatchAxes(model.tp, self.mesh.axis("cp"), model.context_parallel_exchange)
        try:
            check_shapes(**tensors)
            rows = input_ids.shape[0]
            if rows < m or m == 1:
                return [read_batch(model.config, axes, m, keep_all=keep_all, **tensors)], [dict(extras)]
            cut = _cut({k: v if v is None or v.dim() == 2 else [v] * m for k, v in tensors.items()}, rows, m)
            return [read_batch(model.config, axes, 1, keep_all=keep_all, **part) for part in cut], _cut(extras, rows, m)
        except ValueError as error:
            return [stand_in(model.config, axes, 1, input_ids.device, error)], [dict(extras)]

    def _agree(self, batches: list[CausalLMBatch], mode: int) -> tuple[float, bool]:
        """Weight of all labels on all ranks (1 where there are none), once everybody's data is known to be sound.

        Ranks of one data replica must be given the same batch and arguments, see :mod:`..models.losses`; here their
        stages would wait for each other forever.

        Returns:
            The weight, and whether a rank has fewer rows than micro-batches.
        """
        mesh, faults = self.mesh, torch.stack([b.faults for b in batches]).sum(0)
        number = torch.full((), mode, device=faults.device)
        for batch in batches:
            number = (number * 31 + batch.fingerprint + 17 * batch.sequence.rows) % PRIME
        slots = same_batch_slots(number, mesh)
        weight = torch.stack([b.weight_N[b.labelled_index].double().sum() for b in batches]).sum()
        if mesh.tp.index or mesh.place["pp"]:  # what the first of those who share a batch says counts for all of them
            weight = torch.zeros_like(weight)
        if mesh.tp.index or mesh.place["pp"] or mesh.place["cp"]:
            faults[:3] = 0
        short = faults.new_tensor([batches[0].sequence.rows < batches[0].sequence.num_microbatches])
        mine = torch.cat([weight[None], short, faults, slots.flatten()])
        totals = comm.all_reduce_raw(mine, mesh.world).cpu()
        check_faults(totals[2:6], batches[0].error, self._model.config.vocab_size, self._model.num_microbatches)
        check_same_batch(totals[6:], mesh)
        return float(totals[0]) or 1.0, bool(totals[1])

    def _totals(self, job: Job) -> _Totals:
        """What the last stage found, on all ranks; the same bits on each.

        Raises:
            Exception: What a ``loss_fn`` raised; on other ranks, that it did.
        """
        mesh, device = self.mesh, job.batches[0].faults.device
        mine = torch.zeros(4, dtype=torch.float64, device=device)
        if job.sums and mesh.tp.index == 0:
            mine[:2] = torch.stack(list(job.sums.values())).sum(0)
        if job.auxiliary and mesh.stage.index == 0:
            mine[2] = torch.stack(list(job.auxiliary.values())).sum()
        mine[3] = job.error is not None
        total = comm.all_reduce_raw(mine, mesh.world)
        weight = 1.0
        if job.loss_fn is not None:
            weight = float(total[1]) or 1.0
            if job.error is not None:
                raise job.error
            if bool(total[3]):
                raise RuntimeError("loss_fn failed on another rank, which holds the last pipeline stage and says why.")
        else:
            weight = 1 / job.scale
        return _Totals(total[0] / weight, weight, total[2] if job.batches[0].sequence.wants_routing else None)

    def _output(self, job: Job, totals: _Totals, labelled: bool) -> CausalLMOutput:
        dtype = wide(self._dtype)
        auxiliary = None if totals.auxiliary is None else totals.auxiliary.to(dtype)
        if not labelled:
            return CausalLMOutput(aux_loss=auxiliary)
        language = totals.language.to(dtype)
        if auxiliary is None:
            return CausalLMOutput(language, language)
        return CausalLMOutput(language + self._model.config.router_aux_loss_coef * auxiliary, language, auxiliary)

    def _differentiable(self, output: CausalLMOutput, kept: Kept, factor: float) -> CausalLMOutput:
        assert output.loss is not None
        # A loss means the mean over data ranks, whose gradients are summed (modules/balance.py); this is a global value.
        loss = differentiable(output.loss, kept, factor * self.mesh.dp_cp.size)
        if output.aux_loss is None:
            output = output._replace(loss=loss, lm_loss=loss)
        else:
            assert output.lm_loss is not None
            language, auxiliary = (value_only(part, _VALUES) for part in (output.lm_loss, output.aux_loss))
            output = CausalLMOutput(loss, language, auxiliary, output.logits)
        return output if output.logits is None else output._replace(logits=value_only(output.logits, _VALUES))

    def _logits(self, job: Job, gather: bool) -> Tensor | None:
        mine = torch.cat([job.logits[i] for i in sorted(job.logits)]) if job.logits else None
        if not gather:
            return mine
        pp, rows = self.mesh.axis("pp"), sum(b.sequence.rows for b in job.batches)
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
            wires += (Wire((2, config.num_experts), torch.float64),)
        run = self.runner.train if training else self.runner.evaluate
        return run(job, len(job.batches), wires, next(self._model.parameters()).device)


def _cut(values: Mapping[str, Any], rows: int, m: int) -> list[dict[str, Any]]:
    """Tensors of ``rows`` rows in blocks, lists entry by entry, all else to everybody."""
    columns = {
        name: value if isinstance(value, list)
        else value.tensor_split(m) if isinstance(value, Tensor) and value.dim() and value.shape[0] == rows
        else [value] * m
        for name, value in values.items()
    }  # fmt: skip
    return [{name: column[i] for name, column in columns.items()} for i in range(m)]

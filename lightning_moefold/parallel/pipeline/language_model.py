# SPDX-License-Identifier: Apache-2.0
"""The language model in a pipeline: its batches, its losses, and how it is cut into stages.

Beside the hidden states travel, for the losses of routers, what the routers of all layers so far have done: small tables
(:mod:`..models.router_losses`). The losses form on the last stage from the tables of all layers and ranks; the gradient of the
tables travels back the same way, so that each router gets exactly what it gets without a pipeline, whatever the schedule.

Legend: M micro-batches, T tokens of this tp rank, N tokens of the rows, D hidden size, L layers whose tables are kept apart,
G groups of tokens, S rows of a table, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_moefold.agreement import PRIME
from lightning_moefold.errors import InputError
from lightning_moefold.layout import even_split
from lightning_moefold.mesh import FoldedMesh
from lightning_moefold.models import MoECausalLM
from lightning_moefold.models.batch import CausalLMBatch, check_shapes, empty_batch, read_batch, stand_in
from lightning_moefold.models.causal_lm import CausalLMOutput, LossFunction
from lightning_moefold.models.losses import Factors, Losses, StepLabels, check_faults
from lightning_moefold.models.router_losses import RouterLosses
from lightning_moefold.modules.base import wide
from lightning_moefold.parallel.pipeline.engine import Kept, ScheduleRunner, Wire, differentiable, value_only
from lightning_moefold.parallel.pipeline.pipeline import Pipeline
from lightning_moefold.parallel.pipeline.plan import PipelinePlan
from lightning_moefold.parallel.pipeline.stage import Call, Carried, Objective, Stage, Staged, cut_rows

_VALUES = (
    "only output.loss can be differentiated: its gradients were made during the call, and logits, lm_loss, aux_loss and z_loss "
    "are values; compute your loss in a loss_fn, or detach() them."
)


@dataclass(kw_only=True)
class LanguageCall(Call):
    """One call of the language model.

    Args:
        loss_fn: A loss of the user's own.
        extras: Its further arguments, for each micro-batch.
        labelled: Whether there are labels.
        wants_logits: Whether logits are kept.
        gather_logits: Whether every rank is to have them.
        last_logits: Whether they are those of the last position.
        step: The optimizer step whose labels the loss is divided by, if not those of the batch.

    Attributes:
        labels: Weight of all labels on all ranks; 1 where there are none.
        factors: By what gradients are multiplied.
        sizes: Tokens that count, and rows and micro-batches that have any, on all ranks (at least 1 each).
        scale: By which sums of losses are multiplied before backward.
        slope_LGE: Of the load-balancing loss, where its group is the whole batch and all of it has been routed once.
        routing: Load-balancing loss and z-loss of each micro-batch, the share of this rank's tokens.
        tables: Routing tables of each micro-batch, where the group is the whole batch.
    """

    batches: list[CausalLMBatch]
    loss_fn: LossFunction | None
    extras: list[dict[str, Any]]
    labelled: bool
    wants_logits: bool
    gather_logits: bool
    last_logits: bool
    step: StepLabels | None
    labels: float = 1.0
    factors: Factors = Factors()
    sizes: tuple[float, float, float] = (1.0, 1.0, 1.0)
    scale: float = 1.0
    slope_LGE: Tensor | None = None
    routing: dict[int, Tensor] = field(default_factory=dict)
    tables: dict[int, Tensor] = field(default_factory=dict)


class StagedLanguageModel(Staged[LanguageCall]):
    """A language model in stages, cut down to what this rank holds."""

    users_code = "loss_fn"
    module: MoECausalLM

    def __init__(self, model: MoECausalLM, mesh: FoldedMesh) -> None:
        self.module, self.mesh = model, mesh
        self._routers = RouterLosses(model.config, mesh)

    @property
    @override
    def layers(self) -> Mapping[str, nn.Module]:
        return dict(self.module.model.layers.items())

    @override
    def ends(self, *, first: bool, last: bool) -> nn.Module:
        model, tied = self.module.model, self.module.config.tie_word_embeddings
        ends: dict[str, nn.Module | None] = {"embed_tokens": model.embed_tokens} if first or (last and tied) else {}
        ends |= {"norm": model.norm, "lm_head": self.module.lm_head} if last else {}
        return nn.ModuleDict({name: part for name, part in ends.items() if part is not None})

    # ---- before the schedule -----------------------------------------------------------------------------------

    @override
    def read(
        self,
        tensors: Mapping[str, Any],
        loss_fn: LossFunction | None,
        gather_logits: bool,
        last_logits: bool,
        extras: Mapping[str, Any],
    ) -> LanguageCall:
        """Reads the arguments of :meth:`.MoECausalLM.forward`.

        ``loss_fn`` runs on the last stage, on one micro-batch at a time. Of its ``extras``, tensors with an entry for each row of
        the batch are cut like the batch. Whole logits, or those of the last position, are sent to every stage if asked for.
        """
        labelled = tensors["labels"] is not None
        training = labelled and torch.is_grad_enabled()
        batches, parts = self._microbatches(tensors, extras, keep_all=gather_logits or loss_fn is not None)
        mode = 16 * last_logits + 8 * training + 4 * labelled + 2 * gather_logits + (loss_fn is not None)
        number = torch.full((), mode, device=batches[0].faults.device)
        for batch in batches:
            batch.last_only = last_logits
            number = (number * 31 + batch.fingerprint + 17 * batch.sequence.rows) % PRIME
        ahead = loss_fn is not None or self._balances_batch()
        return LanguageCall(
            batches=batches, device=next(self.module.parameters()).device, training=training, number=number,
            fault=batches[0].error, may_fail=loss_fn is not None,
            looks_ahead=training and batches[0].sequence.wants_routing and ahead,
            loss_fn=loss_fn, extras=parts, labelled=labelled, gather_logits=gather_logits or last_logits,
            last_logits=last_logits, wants_logits=gather_logits or last_logits or (not labelled and self.mesh.tp.size == 1),
            step=self.module.take_step_labels(tensors["labels"], loss_fn),
        )  # fmt: skip

    def _balances_batch(self) -> bool:
        config = self.module.config
        return self.module.num_microbatches > 1 and config.wants_aux_loss and config.aux_loss == "global_batch"

    def _microbatches(
        self, tensors: Mapping[str, Any], extras: Mapping[str, Any], *, keep_all: bool
    ) -> tuple[list[CausalLMBatch], list[dict[str, Any]]]:
        """Returns the micro-batches and their extras; if they cannot be read, a stand-in that carries the error to all ranks."""
        model, input_ids, m = self.module, tensors["input_ids"], self.module.num_microbatches
        axes = model.batch_axes()
        try:
            model.note_trained()
            check_shapes(**tensors)
            if m == 1:
                return [read_batch(model.config, axes, 1, keep_all=keep_all, **tensors)], [dict(extras)]
            rows = input_ids.shape[0]
            sizes = even_split(rows, m)
            whole = {name: tensor for name, tensor in tensors.items() if tensor is None or tensor.dim() != 2}
            parts = cut_rows({name: tensor for name, tensor in tensors.items() if name not in whole}, rows, sizes)
            batches = [
                read_batch(model.config, axes, 1, keep_all=keep_all, rows_before=before, **part, **whole)
                if size
                else empty_batch(model.config, axes, input_ids)
                for part, size, before in zip(parts, sizes, accumulate(sizes, initial=0), strict=False)
            ]
            return batches, cut_rows(dict(extras), rows, sizes)
        except ValueError as error:
            return [stand_in(model.config, axes, 1, input_ids.device, error)], [dict(extras)]

    @override
    def numbers(self, call: LanguageCall) -> Tensor:
        # Weight of labels, bad tokens and labels, tokens and rows that count, tokens of each micro-batch, labels of a step.
        mesh, batches = self.mesh, call.batches
        size_M2 = torch.stack([b.sizes for b in batches])
        tokens_M = F.pad(size_M2[:, 0], (0, self.module.num_microbatches - len(batches)))
        weight = torch.stack([b.weight_N[b.labelled_index].double().sum() for b in batches]).sum()
        faults = torch.stack([b.faults[:2] for b in batches]).sum(0)
        ahead = weight.new_zeros(0) if call.step is None else call.step.numbers(weight.device)
        tokens, rows = size_M2.sum(0).split(1)
        # What the first of those who share a batch says counts for all of them.
        of_stage = mesh.place["pp"] == 0
        of_tp = of_stage and mesh.tp.index == 0
        of_cp = of_tp and mesh.place["cp"] == 0
        parts = [
            (weight[None], of_tp),
            (faults, of_cp),
            (tokens, of_stage),
            (rows, of_cp),
            (tokens_M, True),
            (ahead, of_cp),
        ]
        return torch.cat([part if counts else torch.zeros_like(part) for part, counts in parts])

    @override
    def agree(self, call: LanguageCall, totals: Tensor) -> None:
        m, config, batches = self.module.num_microbatches, self.module.config, call.batches
        labels, faults, sizes, tokens_M, ahead = totals.tensor_split([1, 3, 5, 5 + m])
        bad_tokens, bad_labels = faults.tolist()
        check_faults(bad_tokens, bad_labels, config.vocab_size)
        counted, rows, filled = float(sizes[0]), float(sizes[1]), float((tokens_M > 0).sum())
        if call.step is not None:
            call.factors = Factors.of(call.step, float(labels), *ahead.tolist())
        call.labels, call.sizes = float(labels) or 1.0, (counted or 1.0, rows or 1.0, filled or 1.0)
        call.scale = call.factors.lm / call.factors.routers / call.labels
        sequences = [batch.sequence for batch in batches]
        groups, turn = max(s.num_groups for s in sequences), self.module.next_call()
        adapter_turn = self.module.next_adapter_call()
        for sequence in sequences:
            sequence.num_groups, sequence.call, sequence.adapter_call = groups, turn, adapter_turn
        call.lengths = [(s.tokens + s.padding) // s.tp.size for s in sequences]
        call.wires = (Wire((max(call.lengths), config.hidden_size), self._dtype),)
        if sequences[0].wants_routing:
            call.wires += (Wire(self._routers.shape(groups), torch.float64),)

    # ---- in the schedule ---------------------------------------------------------------------------------------

    @override
    def embed(self, call: LanguageCall, number: int) -> Carried:
        # Beside the hidden states go the tables [L, S, E], where routers have losses.
        batch = call.batches[number]
        x_TD = self.module.model.embed_tokens(batch.token_N, batch.sequence)
        return x_TD, *(torch.zeros(w.shape, dtype=w.dtype, device=x_TD.device) for w in call.wires[1:])

    @override
    def run(self, stage: Stage, carried: Carried, call: LanguageCall, number: int) -> Carried:
        x_TD, *tables = carried
        batch = call.batches[number]
        # Backward comes to another stage of this rank much later, so this one brings back nothing of it.
        batch.sequence.offloaded = None
        if batch.sequence.cos_BLh is None:
            batch.set_rotary_tables(x_TD.dtype)
        for name, layer in zip(stage.names, stage.layers, strict=True):
            output = layer(x_TD, batch.sequence)
            if isinstance(output, tuple):
                x_TD, table_SE = output
                tables = [self._routers.add(tables[0], int(name), table_SE)]
            else:
                x_TD = output
        return x_TD, *tables

    @override
    def head(self, carried: Carried, call: LanguageCall, number: int) -> Objective:
        model, batch, (x_TD, *tables) = self.module, call.batches[number], carried
        x_ND = batch.sequence.gather(model.model.norm(x_TD))
        logits = local = None
        if call.wants_logits or call.loss_fn is not None:
            logits = model.whole_logits(x_ND, batch)
        objective = x_ND.new_zeros((), dtype=torch.float64)
        with nullcontext() if call.loss_fn is None else call.keeping_errors():
            local = model.local_loss(x_ND, logits, batch, call.loss_fn, call.extras[number])
        if local is not None:
            call.note(number, *local)
            objective = objective + call.scale * local[0].double()
        for routing_LSE in tables:
            objective = objective + self._router_losses(routing_LSE, call, number)
        if call.wants_logits and logits is not None and not batch.is_empty:
            call.outputs[number] = logits.detach()
        return Objective(objective, x_ND if logits is None else logits, local is not None)

    def _router_losses(self, routing_LSE: Tensor, call: LanguageCall, number: int) -> Tensor:
        """This rank's share of the weighted losses; one or two collectives over the stage."""
        routers, config = self._routers, self.module.config
        balance = z = routing_LSE.new_zeros(())
        if config.wants_aux_loss and routers.per_batch and len(call.batches) > 1 and call.slope_LGE is None:
            call.tables[number] = routing_LSE.detach()  # the loss forms when all micro-batches have come by
        elif config.wants_aux_loss:
            slope_LGE = routers.slope(routing_LSE) if call.slope_LGE is None else call.slope_LGE
            groups = call.sizes[1] if routers.per_row else 1 if routers.per_batch else call.sizes[2]
            balance = routers.balance(routing_LSE, slope_LGE) / groups
        if config.wants_z_loss:
            z = routers.z(routing_LSE) / call.sizes[0]
        call.routing[number] = torch.stack([balance.detach(), z.detach()])
        return config.router_aux_loss_coef * balance + config.router_z_loss_coef * z

    @override
    def evaluated(self, call: LanguageCall) -> None:
        # The load-balancing loss of the whole batch, where the tables of every micro-batch are here.
        if call.tables:
            tables_LSE = torch.stack([call.tables[i] for i in sorted(call.tables)]).sum(0)
            call.slope_LGE = self._routers.slope(tables_LSE)
            call.routing[0][0] = self._routers.balance(tables_LSE, call.slope_LGE)

    # ---- after the schedule ------------------------------------------------------------------------------------

    @override
    def found(self, call: LanguageCall) -> Tensor:
        # Sum of losses and weight, load-balancing loss and z-loss.
        mine = torch.zeros(4, dtype=torch.float64, device=call.batches[0].faults.device)
        if call.sums and self.mesh.tp.index == 0:
            mine[:2] = torch.stack(list(call.sums.values())).sum(0)
        if call.routing:
            mine[2:] = torch.stack(list(call.routing.values())).sum(0)
        return mine

    @override
    def looked(self, call: LanguageCall, totals: Tensor) -> None:
        # The weight that a loss_fn finds decides how its gradients compare with those of the losses of routers.
        call.scale = call.factors.lm / call.factors.routers / self._weight(call, totals)

    def _weight(self, call: LanguageCall, totals: Tensor) -> float:
        """By what the sum of losses is divided; 1 for none."""
        return call.labels if call.loss_fn is None else float(totals[1]) or 1.0

    @override
    def finish(self, call: LanguageCall, totals: Tensor, kept: Kept, runner: ScheduleRunner) -> CausalLMOutput:
        config, weight, dtype = self.module.config, self._weight(call, totals), wide(self._dtype)
        losses = Losses(
            (totals[0] / weight).to(dtype) if call.labelled else None,
            totals[2].to(dtype) if config.wants_aux_loss else None,
            totals[3].to(dtype) if config.wants_z_loss else None,
        )
        logits = self._logits(call, runner) if call.wants_logits else None
        output = self.module.make_output(losses, logits, call.labelled)
        if not call.training:
            return output
        # Of a loss_fn alone, the weight is known only now.
        factor = call.factors.routers if call.step is not None else 1 / (call.scale * weight)
        # A loss means the mean over data ranks, whose gradients are summed (modules/balance.py); this is a global value.
        assert output.loss is not None
        loss = differentiable(output.loss, kept, factor * self.mesh.dp_cp.size)
        alone = output.aux_loss is None and output.z_loss is None
        values = {name: value_only(value, _VALUES) for name, value in output._asdict().items() if value is not None}
        return output._replace(**{**values, "loss": loss, "lm_loss": loss if alone else values["lm_loss"]})

    def _logits(self, call: LanguageCall, runner: ScheduleRunner) -> Tensor | None:
        if not call.gather_logits:
            return call.output()
        rows = sum(b.sequence.rows for b in call.batches if not b.is_empty)
        length = 1 if call.last_logits else call.batches[0].true_length
        shape = (rows, length, self.module.config.vocab_size)
        return runner.from_last(call.output(), Wire(shape, self._dtype), call.device)

    @property
    def _dtype(self) -> torch.dtype:
        """Of the hidden states."""
        return self.module.compute_dtype or next(self.module.parameters()).dtype


# ---- cutting ---------------------------------------------------------------------------------------------------------


def cut_into_stages(model: MoECausalLM, mesh: FoldedMesh, plan: PipelinePlan) -> list[Stage]:
    """Leaves to this rank what its pipeline stages need; the layouts go on to tell of all parameters.

    Raises:
        InputError: If the model cannot be cut so.
    """
    pp = mesh.fold.pp
    if pp == 1:
        return []
    layers, count = plan.layers(model.config, pp), pp * plan.chunks
    first, last = plan.owner(0, pp), plan.owner(count - 1, pp)
    holders: dict[str, tuple[int, ...]] = {
        f"model.layers.{i}.": (plan.owner(stage, pp),) for stage, part in enumerate(layers) for i in part
    }
    holders |= {"model.norm.": (last,), "lm_head.": (last,), "model.embed_tokens.": (first,)}
    if model.config.tie_word_embeddings:
        if first == last:
            raise InputError(
                f"pipeline_schedule={plan.schedule!r} puts the first and the last stage on one rank, which does not go with tied "
                "embeddings; use another schedule, such as 'interleaved_1f1b'."
            )
        holders["model.embed_tokens."] = (first, last)
    holders_of = {name: next(v for k, v in holders.items() if name.startswith(k)) for name in model.layouts}
    model.layouts = {name: replace(layout, pp_ranks=holders_of[name]) for name, layout in model.layouts.items()}
    place = mesh.place["pp"]
    for prefix, ranks in holders.items():
        if place not in ranks:
            parent, _, leaf = prefix[:-1].rpartition(".")
            owner = model.get_submodule(parent)
            if isinstance(owner, nn.ModuleDict):
                del owner[leaf]
            else:
                owner.register_module(leaf, None)
    mine = {stage: [str(i) for i in layers[stage]] for stage in plan.local_stages(pp, place)}
    model.pipeline = pipeline = Pipeline(StagedLanguageModel(model, mesh), mesh, plan, mine)
    model.stages = pipeline.stages
    return pipeline.stages

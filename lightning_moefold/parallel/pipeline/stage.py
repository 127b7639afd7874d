# SPDX-License-Identifier: Apache-2.0
"""What one pipeline stage computes: its layers, on one micro-batch at a time.

From stage to stage travel the hidden states, padded to the longest micro-batch (pipelining wants one shape), and for
the losses of routers what those of all layers so far have done: small tables (:mod:`..models.router_losses`). The losses
form on the last stage from the tables of all layers and ranks; the gradient of the tables travels back the same way, so
that each router gets exactly what it gets without a pipeline, whatever the schedule.

Legend: T tokens of this tp rank, C tokens of the longest micro-batch, N tokens of the rows, D hidden size, L layers whose
tables are kept apart, G groups of tokens, S rows of a table, E experts, M micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_moefold.models import MoECausalLM
from lightning_moefold.models.batch import CausalLMBatch
from lightning_moefold.models.router_losses import RouterLosses


@dataclass
class Job:
    """One call of the model: its micro-batches, and what the last stage found.

    Args:
        batches: The micro-batches.
        loss_fn: A loss of the user's own.
        extras: Its further arguments, for each micro-batch.
        wants_logits: Whether logits are kept.
        capacity: C.
        scale: By which sums of losses are multiplied before backward.
        sizes: Tokens that count, and rows and micro-batches that have any, on all ranks (at least 1 each).

    Attributes:
        slope_LGE: Of the load-balancing loss, where its group is the whole batch and all of it has been routed once.
        sums: Sum of losses and weight on this data rank, of each micro-batch.
        routing: Load-balancing loss and z-loss of each micro-batch, the share of this rank's tokens.
        tables: Routing tables of each micro-batch, where the group is the whole batch.
        logits: Of each micro-batch.
        error: What ``loss_fn`` raised.
    """

    batches: list[CausalLMBatch]
    loss_fn: Callable[..., tuple[Tensor, Tensor]] | None
    extras: list[dict[str, Any]]
    wants_logits: bool
    capacity: int
    scale: float = 1.0
    sizes: tuple[float, float, float] = (1.0, 1.0, 1.0)
    slope_LGE: Tensor | None = None
    sums: dict[int, Tensor] = field(default_factory=dict)
    routing: dict[int, Tensor] = field(default_factory=dict)
    tables: dict[int, Tensor] = field(default_factory=dict)
    logits: dict[int, Tensor] = field(default_factory=dict)
    error: Exception | None = None

    @property
    def groups(self) -> int:
        """G; the same for all micro-batches."""
        return self.batches[0].sequence.num_groups


class Stage(nn.Module):
    """Some layers of a model, with the embedding before the first and the head after the last.

    Shares its modules with the model; ``fully_shard`` wraps it, because every stage gathers and reduces on its own.

    Args:
        model: The model, cut down to what this pipeline rank holds.
        index: Of the stage.
        count: Stages in all.
        layers: Numbers of its layers.
    """

    def __init__(self, model: MoECausalLM, index: int, count: int, layers: range) -> None:
        super().__init__()
        self.index, self.is_first, self.is_last = index, index == 0, index == count - 1
        tied = model.config.tie_word_embeddings
        self.embed_tokens = model.model.embed_tokens if self.is_first or (self.is_last and tied) else None
        self.numbers = layers
        self.layers = nn.ModuleList(model.model.layers[str(i)] for i in layers)
        self.norm = model.model.norm if self.is_last else None
        self.lm_head = model.lm_head if self.is_last else None
        self.job: Job | None = None
        self._model = (model,)  # not registered: the model is not a part of its stages

    def units(self) -> list[nn.Module]:
        """The modules whose dense weights are gathered together, inner ones first."""
        return [*self.layers, self]

    def forward(self, *received: Tensor, microbatch: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Runs one micro-batch.

        Args:
            received: From the stage before: hidden states ``[C, D]``, and routing tables ``[L, S, E]``.
            microbatch: Its number, ``[1]`` on the CPU.

        Returns:
            What the next stage receives; on the last stage, the scalar to be differentiated.
        """
        assert self.job is not None
        number = int(microbatch)
        batch = self.job.batches[number]
        sequence = batch.sequence
        if self.embed_tokens is not None and self.is_first:
            x_TD = self.embed_tokens(batch.token_N, sequence)
        else:
            x_TD = received[0][: (sequence.tokens + sequence.padding) // sequence.tp.size]
        if sequence.cos_BLh is None:
            batch.place(x_TD.dtype)
        routing_LSE = self._routing_so_far(received, x_TD.device) if sequence.wants_routing else None
        for index, layer in zip(self.numbers, self.layers, strict=True):
            output = layer(x_TD, sequence)
            if isinstance(output, tuple):
                x_TD, table_SE = output
                assert routing_LSE is not None
                routing_LSE = self._routers.add(routing_LSE, index, table_SE)
            else:
                x_TD = output
        if self.is_last:
            return self._finish(x_TD, routing_LSE, batch, number)
        x_CD = F.pad(x_TD, (0, 0, 0, self.job.capacity - x_TD.shape[0]))
        if torch.is_grad_enabled() and not x_CD.requires_grad:
            # Where all is frozen so far, pipelining still wants something to run backward from.
            x_CD = x_CD + torch.zeros((), dtype=x_CD.dtype, device=x_CD.device, requires_grad=True)
        return (x_CD,) if routing_LSE is None else (x_CD, routing_LSE)

    def _routing_so_far(self, received: tuple[Tensor, ...], device: torch.device) -> Tensor:
        if not self.is_first:
            return received[1] + 0.0  # a tensor of its own even where no layer adds to it
        assert self.job is not None
        return torch.zeros(self._routers.shape(self.job.groups), dtype=torch.float64, device=device)

    @property
    def _routers(self) -> RouterLosses:
        return RouterLosses(self._model[0].config, self._model[0].mesh)

    # ---- the last stage ----------------------------------------------------------------------------------------

    def _finish(self, x_TD: Tensor, routing_LSE: Tensor | None, batch: CausalLMBatch, number: int) -> Tensor:
        assert self.norm is not None
        assert self.lm_head is not None
        assert self.job is not None
        job, model = self.job, self._model[0]
        x_ND = batch.sequence.gather(self.norm(x_TD))
        logits = None
        if job.wants_logits or job.loss_fn is not None:
            logits = model._whole_logits(x_ND, batch)
        objective = x_ND.new_zeros((), dtype=torch.float64)
        try:
            local = model._local_loss(x_ND, logits, batch, job.loss_fn, job.extras[number])
        except Exception as failure:  # raised after the schedule, together with all ranks
            if job.loss_fn is None:
                raise
            job.error, local = job.error or failure, None
        if local is not None:
            total, weight = local
            job.sums[number] = torch.stack([total.detach().double(), weight.detach().double()])
            objective = objective + job.scale * total.double()
        if routing_LSE is not None:
            objective = objective + self._router_losses(routing_LSE, number)
        if job.wants_logits and logits is not None and not batch.is_empty:
            job.logits[number] = logits.detach()
        if torch.is_grad_enabled() and (local is None or not objective.requires_grad):
            # A loss_fn failed or returned a constant, or there are no rows: the gradients are zero, but every rank takes part
            # in those of all layers.
            objective = objective + 0 * (x_ND if logits is None else logits).sum().double()
        return objective

    def _router_losses(self, routing_LSE: Tensor, number: int) -> Tensor:
        """This rank's share of the weighted losses; one or two collectives over the stage."""
        assert self.job is not None
        job, routers, config = self.job, self._routers, self._model[0].config
        balance = z = routing_LSE.new_zeros(())
        if config.wants_aux_loss and routers.per_batch and len(job.batches) > 1 and job.slope_LGE is None:
            job.tables[number] = routing_LSE.detach()  # the loss forms when all micro-batches have come by
        elif config.wants_aux_loss:
            slope_LGE = routers.slope(routing_LSE) if job.slope_LGE is None else job.slope_LGE
            groups = job.sizes[1] if routers.per_row else 1 if routers.per_batch else job.sizes[2]
            balance = routers.balance(routing_LSE, slope_LGE) / groups
        if config.wants_z_loss:
            z = routers.z(routing_LSE) / job.sizes[0]
        job.routing[number] = torch.stack([balance.detach(), z.detach()])
        return config.router_aux_loss_coef * balance + config.router_z_loss_coef * z

    def balance_whole_batch(self) -> None:
        """The load-balancing loss of the whole batch, once every micro-batch's tables are there. Collective over the stage."""
        assert self.job is not None
        job, routers = self.job, self._routers
        if job.tables:
            tables_LSE = torch.stack([job.tables[i] for i in sorted(job.tables)]).sum(0)
            job.slope_LGE = routers.slope(tables_LSE)
            job.routing[0][0] = routers.balance(tables_LSE, job.slope_LGE)

# SPDX-License-Identifier: Apache-2.0
"""Reduces each rank's share of the losses to those of the whole batch, bit-identical on every rank.

    lm   = sum over all ranks of loss sums / sum over all ranks of weights

and the losses of routers (:mod:`.router_losses`). This takes one collective, and for load balance by rows one more each
over tp and cp. Backward needs no communication: the gradient of the global value with respect to this rank's tokens
depends on the other ranks only through counts and weights, which are known.

Legend: G groups of tokens, L layers, S = 2 G + 1 rows of a routing table, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_moefold import comm
from lightning_moefold.agreement import check_readable, check_same_batch, same_batch_slots
from lightning_moefold.errors import BatchError
from lightning_moefold.mesh import FoldedMesh
from lightning_moefold.models.batch import CausalLMBatch
from lightning_moefold.models.config import MoEConfig
from lightning_moefold.models.router_losses import RouterLosses
from lightning_moefold.modules.balance import global_value
from lightning_moefold.modules.routers.statistics import filled_groups, split_table


@dataclass
class Losses:
    """Global losses, unweighted; None if there are no labels or the loss is off."""

    lm: Tensor | None
    aux: Tensor | None
    z: Tensor | None


class StepLabels(NamedTuple):
    """Label weights of an optimizer step that accumulates several batches, on this data rank.

    Args:
        batch: Total label weight of this batch, a scalar.
        step: Total label weight of all batches of the step, a scalar.
        batches: Number of batches in the step.
        divisor: Number by which Lightning divides the loss of each batch. It differs from ``batches`` in a short last
            step.
    """

    batch: Tensor
    step: Tensor
    batches: int
    divisor: int

    def numbers(self, device: torch.device) -> Tensor:
        """Returns the two weights to be summed over data ranks, ``[2]`` float64."""
        return torch.stack([self.batch.to(device), self.step.to(device)])


class Factors(NamedTuple):
    """Factors of the gradients of a batch's losses; the values of the losses stay those of the batch.

    Args:
        lm: Factor of the language-model loss.
        routers: Factor of the losses of routers.
    """

    lm: float = 1.0
    routers: float = 1.0

    @classmethod
    def of(cls, step: StepLabels, weight: float, batch: float, total: float) -> Factors:
        """Computes factors that make the step's language-model loss a mean over labels, and router losses means over batches.

        Args:
            step: Label weights of the step.
            weight: Label weight in this call of the model, summed over all ranks.
            batch: Label weight of the batch as counted in advance, summed over all ranks.
            total: Label weight of the step, summed over all ranks.

        Raises:
            BatchError: If the labels were counted wrongly or could not be counted.
        """
        if not abs(weight - batch) <= 1e-5 * max(weight, 1.0):
            raise BatchError(
                "calculate_per_token_loss=True counts the labels of each batch as the DataLoader gives it"
                + (
                    f" ({batch:g}), but the model is called with others ({weight:g})"
                    if batch == batch
                    else ", which has none"
                )
                + "; give batches as mappings with the labels that training_step passes on, or set it to False."
            )
        return cls(step.divisor * weight / total if total else 0.0, step.divisor / step.batches)


class GlobalLoss:
    """Reduces losses over the ranks of a stage.

    Args:
        config: The model's configuration.
        mesh: The folded mesh, or None on one rank.
        dtype: Data type of the losses of routers.
        step: The optimizer step by whose labels the loss is divided; None to divide by those of the batch.
    """

    def __init__(
        self, config: MoEConfig, mesh: FoldedMesh | None, dtype: torch.dtype, step: StepLabels | None = None
    ) -> None:
        self.config, self.mesh, self.dtype, self.step = config, mesh, dtype, step
        self._factors = Factors()
        self._routers = RouterLosses(config, mesh)

    def reduce(self, local: tuple[Tensor, Tensor] | None, batch: CausalLMBatch) -> Losses:
        """Reduces the losses of a batch. Collective over the stage.

        Args:
            local: Sum of losses and weight on this data rank (equal on its tp ranks), or None without labels.
            batch: The batch, for its routing tables and faults.

        Raises:
            BatchError: On every rank, if any rank's data is at fault.
        """
        zero = batch.faults.new_zeros(2)
        sums = zero if local is None else torch.stack([local[0].detach().double(), local[1].detach().double()])
        # tp ranks computed the same sums, and cp ranks found the same faults, so only the first of them contributes.
        # The tokens, and so the statistics, of all ranks are distinct.
        first_tp = self.mesh is None or self.mesh.tp.index == 0
        first_cp = self.mesh is None or self.mesh.axis("cp").index == 0
        faults, sizes = batch.faults.clone(), batch.sizes.clone()
        if not (first_tp and first_cp):
            faults[:2] = 0  # except a batch that only this rank cannot read
            sizes[1] = 0
        tables_LSE, slope_LGE, known = self._routing(batch)
        prints = self._same_batch(batch)
        ahead = faults.new_zeros(0) if self.step is None else self.step.numbers(faults.device)
        ahead = ahead if first_tp and first_cp else torch.zeros_like(ahead)
        totals = torch.cat([sums if first_tp else zero, faults, sizes, known, prints, ahead])
        if self.mesh is not None:
            comm.all_reduce_raw(totals, self.mesh.stage)
        sums, faults, sizes, known, prints, ahead = totals.split([2, 3, 2, len(known), len(prints), len(ahead)])
        tokens, labels, unreadable = faults.tolist()
        check_readable(bool(unreadable), batch.error, None if self.mesh is None else self.mesh.stage)
        check_faults(tokens, labels, self.config.vocab_size)
        if self.mesh is not None and len(prints):
            check_same_batch(prints, self.mesh.fold.tp * self.mesh.fold.cp)
        if self.step is not None:
            self._factors = Factors.of(self.step, *torch.cat([sums[1:], ahead]).tolist())
        lm = None if local is None else self._language_loss(local[0], sums[0], sums[1])
        if tables_LSE is None:
            return Losses(lm, None, None)
        return Losses(lm, *self._router_losses(tables_LSE, slope_LGE, known, sizes))

    def _routing(self, batch: CausalLMBatch) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Returns the tables of all layers, the slope of their loss if groups are rows, and the values to sum over ranks."""
        if not batch.routing:
            return None, None, batch.faults.new_zeros(0)
        tables_LSE, routers = self._routers.join(batch.routing), self._routers
        mine = tables_LSE.detach()
        if not routers.per_row:
            return tables_LSE, None, mine.flatten()
        slope_LGE = routers.slope(tables_LSE)
        return tables_LSE, slope_LGE, torch.stack([routers.balance(mine, slope_LGE), routers.z(mine)])

    def _router_losses(
        self, tables_LSE: Tensor, slope_LGE: Tensor | None, known: Tensor, sizes: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        routers = self._routers
        if slope_LGE is None:
            all_LSE = known.view_as(tables_LSE)
            counts_LGE = split_table(all_LSE)[0]
            slope_LGE = routers.slope_of(counts_LGE)
            balance, z = routers.balance(all_LSE, slope_LGE), routers.z(all_LSE)
            groups = filled_groups(counts_LGE).clamp(min=1)
        else:
            balance, z = known.unbind()
            groups = sizes[1].clamp(min=1)
        tokens, aux = sizes[0].clamp(min=1), None
        if self.config.wants_aux_loss:
            aux = self._global(routers.balance(tables_LSE, slope_LGE) / groups, balance / groups)
        return aux, self._global(routers.z(tables_LSE) / tokens, z / tokens) if self.config.wants_z_loss else None

    def _global(self, share: Tensor, value: Tensor) -> Tensor:
        return global_value(share.to(self.dtype), value, self.mesh, factor=self._factors.routers)

    def _same_batch(self, batch: CausalLMBatch) -> Tensor:
        """Returns numbers that show whether tp and cp ranks received the same batch; a wrong loss may look plausible."""
        if self.mesh is None or self.mesh.fold.tp * self.mesh.fold.cp == 1:
            return batch.faults.new_zeros(0)
        return same_batch_slots(batch.fingerprint, self.mesh).flatten()

    def _language_loss(self, local: Tensor, total: Tensor, weight: Tensor) -> Tensor:
        weight = torch.where(weight == 0, torch.ones_like(weight), weight)
        share = (local / weight).to(local.dtype)
        return global_value(share, total / weight, self.mesh, factor=self._factors.lm)


def check_faults(tokens: float, labels: float, vocab_size: int) -> None:
    """Raises if any rank's data lies outside the vocabulary.

    Args:
        tokens: Number of token ids outside the vocabulary, over all ranks.
        labels: Number of labels outside the vocabulary, over all ranks.
        vocab_size: Vocabulary size of the model.

    Raises:
        BatchError: If there are such tokens or labels.
    """
    if tokens or labels:
        what = f"{tokens:.0f} token ids" if tokens else f"{labels:.0f} labels"
        hint = "check that tokenizer and model belong together, or enlarge it (resize_token_embeddings of transformers)"
        hint += "" if tokens else "; -100 is ignored"
        raise BatchError(f"{what} in the batch lie outside the vocabulary of {vocab_size}; {hint}.")

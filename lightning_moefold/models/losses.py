# SPDX-License-Identifier: Apache-2.0
"""From each rank's share to the loss of the whole batch: one collective, the same bits on every rank.

    lm   = sum over all ranks of loss sums / sum over all ranks of weights
    aux  = mean over micro-batches of  E * sum_e f_e * P_e        (``transformers``' formula, pooled over all layers)

with ``f_e`` the choices of expert e and ``P_e`` its summed probability, each divided by the number of (token, layer)
pairs that count, over all ranks. The balanced value is top-k, not 1. Backward needs no communication: the gradient of
the global value with respect to this rank's tokens depends on the others only through counts and weights, which are
known.

Legend: M micro-batches, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_moefold import comm
from lightning_moefold.mesh import FoldedMesh
from lightning_moefold.models.batch import BatchError, CausalLMBatch
from lightning_moefold.models.config import MoEConfig
from lightning_moefold.modules.balance import global_value


@dataclass
class Losses:
    """Global losses; None where there are no labels, or no statistics."""

    lm: Tensor | None
    aux: Tensor | None


class GlobalLoss:
    """Reduces losses over the ranks of a stage.

    Args:
        config: The model's configuration.
        mesh: The folded mesh, or None on one rank.
    """

    def __init__(self, config: MoEConfig, mesh: FoldedMesh | None) -> None:
        self.config, self.mesh = config, mesh

    def reduce(self, local: tuple[Tensor, Tensor] | None, batch: CausalLMBatch) -> Losses:
        """Collective over the stage.

        Args:
            local: Sum of losses and weight on this data rank (equal on its tp ranks), or None without labels.
            batch: For statistics and faults.

        Raises:
            BatchError: On every rank, if any rank's data is at fault.
        """
        statistics = batch.routing
        zero = batch.faults.new_zeros(2)
        sums = zero if local is None else torch.stack([local[0].detach().double(), local[1].detach().double()])
        # tp ranks computed the same sums, and cp ranks, too, found the same faults: one of them contributes. The tokens,
        # hence statistics, of all ranks are distinct.
        first_tp = self.mesh is None or self.mesh.tp.index == 0
        first_cp = self.mesh is None or self.mesh.axis("cp").index == 0
        faults = batch.faults.clone()
        if not (first_tp and first_cp):
            faults[:3] = 0  # but a batch that this rank cannot read may be this rank's alone
        head = torch.cat([sums if first_tp else zero, faults])
        counts_ME = probability_ME = None
        parts = [head]
        if statistics:
            counts_ME = torch.stack([s.counts_ME for s in statistics]).sum(0)
            probability_ME = torch.stack([s.probability_ME for s in statistics]).sum(0)
            parts += [counts_ME.double().flatten(), probability_ME.detach().double().flatten()]
        prints = self._fingerprints(batch)
        totals = torch.cat([*parts, prints])
        if self.mesh is not None:
            comm.all_reduce_raw(totals, self.mesh.stage)
        totals, prints = totals.split([len(totals) - len(prints), len(prints)])
        check_faults(totals[2:6], batch.error, self.config.vocab_size, batch.sequence.num_microbatches)
        self._check_fingerprints(prints)
        lm = None if local is None else self._language_loss(local[0], totals[0], totals[1])
        if counts_ME is None or probability_ME is None:
            return Losses(lm, None)
        all_counts, all_probability = totals[6:].view(2, *counts_ME.shape).unbind(0)
        return Losses(lm, self._auxiliary_loss(probability_ME, all_counts, all_probability))

    def _fingerprints(self, batch: CausalLMBatch) -> Tensor:
        """A small number for this rank's data and its square, in the slots of its data rank.

        Ranks of a tp or cp group must be given the same batch. They are exactly if, in every slot, the number of ranks
        times the sum of squares is the square of the sum; otherwise a run goes on with garbage and a plausible loss.
        """
        if self.mesh is None or self.mesh.fold.tp * self.mesh.fold.cp == 1:
            return batch.faults.new_zeros(0)
        number = batch.fingerprint.double()
        slots = batch.faults.new_zeros(self.mesh.fold.dp, 2)
        slots[self.mesh.place["dp"]] = torch.stack([number, number * number])
        return slots.flatten()

    def _check_fingerprints(self, prints: Tensor) -> None:
        if self.mesh is None or not len(prints):
            return
        number, square = prints.view(-1, 2).unbind(1)
        if bool((square * (self.mesh.fold.tp * self.mesh.fold.cp) != number * number).any()):
            raise BatchError(
                "ranks of a tensor or context parallel group were given different batches, but they compute one batch "
                "together; shard the data by strategy.dp_rank and strategy.dp_size, and shuffle with a seed that all ranks share."
            )

    def _language_loss(self, local: Tensor, total: Tensor, weight: Tensor) -> Tensor:
        weight = torch.where(weight == 0, torch.ones_like(weight), weight)
        share = (local / weight).to(local.dtype)
        return global_value(share, total / weight, self.mesh)

    def _auxiliary_loss(self, local_ME: Tensor, counts_ME: Tensor, probability_ME: Tensor) -> Tensor:
        pairs_M1 = (counts_ME.sum(-1, keepdim=True) / self.config.num_experts_per_tok).clamp(min=1)
        slope_ME = counts_ME / pairs_M1.square() * (self.config.num_experts / counts_ME.shape[0])
        share = (slope_ME.to(local_ME.dtype) * local_ME).sum()
        return global_value(share, (slope_ME * probability_ME).sum(), self.mesh)


def check_faults(faults: Tensor, error: Exception | None, vocab_size: int, num_microbatches: int) -> None:
    """Raises what all ranks agreed on.

    Args:
        faults: ``CausalLMBatch.faults``, summed over ranks.
        error: Why this rank's own batch cannot be read, or None.
        vocab_size: Of the model.
        num_microbatches: M.

    Raises:
        BatchError: If any rank's data is at fault.
    """
    tokens, labels, rows, malformed = (int(n) for n in faults.tolist())
    if error is not None:
        raise BatchError(str(error)) from error
    if malformed:
        raise BatchError("the batch of another rank cannot be read; that rank's own error says why.")
    if tokens or labels:
        what = f"{tokens} token ids" if tokens else f"{labels} labels"
        hint = "check that tokenizer and model belong together" + ("" if tokens else "; -100 is ignored")
        raise BatchError(f"{what} in the batch lie outside the vocabulary of {vocab_size}; {hint}.")
    if rows:
        raise BatchError(
            f"a rank's batch has fewer rows than num_microbatches={num_microbatches}; "
            "use a larger batch size (and drop_last=True for a short last batch), or fewer micro-batches."
        )

# SPDX-License-Identifier: Apache-2.0
"""From each rank's share to the loss of the whole batch: the same bits on every rank.

    lm   = sum over all ranks of loss sums / sum over all ranks of weights

and what the routers add (:mod:`.router_losses`). One collective, and one more over tp and cp each for load balance by rows.
Backward needs no communication: the gradient of the global value with respect to this rank's tokens depends on the others
only through counts and weights, which are known.

Legend: G groups of tokens, L layers, S = 2 G + 1 rows of a routing table, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_moefold import comm
from lightning_moefold.mesh import FoldedMesh
from lightning_moefold.models.batch import BatchError, CausalLMBatch
from lightning_moefold.models.config import MoEConfig
from lightning_moefold.models.router_losses import RouterLosses
from lightning_moefold.modules.balance import global_value
from lightning_moefold.modules.routers.statistics import split_table


@dataclass
class Losses:
    """Global losses, unweighted; None where there are no labels, or where they are not asked for."""

    lm: Tensor | None
    aux: Tensor | None
    z: Tensor | None


class GlobalLoss:
    """Reduces losses over the ranks of a stage.

    Args:
        config: The model's configuration.
        mesh: The folded mesh, or None on one rank.
        dtype: Of the losses of routers.
    """

    def __init__(self, config: MoEConfig, mesh: FoldedMesh | None, dtype: torch.dtype) -> None:
        self.config, self.mesh, self.dtype = config, mesh, dtype
        self._routers = RouterLosses(config, mesh)

    def reduce(self, local: tuple[Tensor, Tensor] | None, batch: CausalLMBatch) -> Losses:
        """Collective over the stage.

        Args:
            local: Sum of losses and weight on this data rank (equal on its tp ranks), or None without labels.
            batch: For routing tables and faults.

        Raises:
            BatchError: On every rank, if any rank's data is at fault.
        """
        zero = batch.faults.new_zeros(2)
        sums = zero if local is None else torch.stack([local[0].detach().double(), local[1].detach().double()])
        # tp ranks computed the same sums, and cp ranks, too, found the same faults: one of them contributes. The tokens,
        # hence statistics, of all ranks are distinct.
        first_tp = self.mesh is None or self.mesh.tp.index == 0
        first_cp = self.mesh is None or self.mesh.axis("cp").index == 0
        faults, sizes = batch.faults.clone(), batch.sizes.clone()
        if not (first_tp and first_cp):
            faults[:3] = 0  # but a batch that this rank cannot read may be this rank's alone
            sizes[1] = 0
        tables_LSE, slope_LGE, known = self._routing(batch)
        prints = self._fingerprints(batch)
        totals = torch.cat([sums if first_tp else zero, faults, sizes, known, prints])
        if self.mesh is not None:
            comm.all_reduce_raw(totals, self.mesh.stage)
        sums, faults, sizes, known, prints = totals.split([2, 4, 2, len(known), len(prints)])
        check_faults(faults, batch.error, self.config.vocab_size, batch.sequence.num_microbatches)
        self._check_fingerprints(prints)
        lm = None if local is None else self._language_loss(local[0], sums[0], sums[1])
        if tables_LSE is None:
            return Losses(lm, None, None)
        return Losses(lm, *self._router_losses(tables_LSE, slope_LGE, known, sizes))

    def _routing(self, batch: CausalLMBatch) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """The tables of all layers, where groups are rows the slope of their loss, and what all ranks are to know."""
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
            slope_LGE = routers.slope_of(split_table(all_LSE)[0])
            balance, z = routers.balance(all_LSE, slope_LGE), routers.z(all_LSE)
            groups = torch.full_like(sizes[0], slope_LGE.shape[1])
        else:
            balance, z = known.unbind()
            groups = sizes[1].clamp(min=1)
        tokens, aux = sizes[0].clamp(min=1), None
        if self.config.wants_aux_loss:
            aux = self._global(routers.balance(tables_LSE, slope_LGE) / groups, balance / groups)
        return aux, self._global(routers.z(tables_LSE) / tokens, z / tokens) if self.config.wants_z_loss else None

    def _global(self, share: Tensor, value: Tensor) -> Tensor:
        return global_value(share.to(self.dtype), value, self.mesh)

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
        hint = "check that tokenizer and model belong together, or enlarge it (resize_token_embeddings of transformers)"
        hint += "" if tokens else "; -100 is ignored"
        raise BatchError(f"{what} in the batch lie outside the vocabulary of {vocab_size}; {hint}.")
    if rows:
        raise BatchError(
            f"a rank's batch has fewer rows than num_microbatches={num_microbatches}; "
            "use a larger batch size (and drop_last=True for a short last batch), or fewer micro-batches."
        )

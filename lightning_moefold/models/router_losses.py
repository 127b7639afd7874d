# SPDX-License-Identifier: Apache-2.0
"""Computes the routers' losses of a language model from the tables that its layers return.

    load balance   mean over layers and groups of  E * sum_e f_e * P_e      (:func:`~..modules.routers.statistics.balance_slope`)
    z-loss         mean over layers and tokens of  logsumexp(logits)^2      (ST-MoE, arXiv 2202.08906, equation 5)

A group is a micro-batch, a row, or the whole batch (``MoEConfig.aux_loss``); groups without a token that counts are
left out.
``"huggingface"`` is the loss of ``transformers``: a group is a micro-batch, and its tokens in all layers are pooled before the
product is formed.

The tables of all layers together are ``[L, S, E]``, with L = 1 if they are pooled. They are small enough to be summed
over ranks, since a group's tokens are spread over ranks, and to travel with the hidden states through a pipeline. The
losses are linear in their differentiable inputs (probabilities and z), so a rank's share of a value is computed by the
same formula, and backward needs no communication.

Legend: L layers, G groups, S = 2 G + 1 rows of a table, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_moefold import comm
from lightning_moefold.mesh import FoldedMesh
from lightning_moefold.models.config import MoEConfig
from lightning_moefold.modules.routers.statistics import balance_slope, split_table


class RouterLosses:
    """The formulas of the routers' losses for one model.

    Args:
        config: Configuration of the model.
        mesh: The folded mesh, or None on one rank.

    Attributes:
        per_row: Whether groups are rows; a group's tokens are then on the tp and cp ranks of one data rank.
        per_batch: Whether there is one group; under a pipeline no gradient is then known before all micro-batches are
            routed.
    """

    def __init__(self, config: MoEConfig, mesh: FoldedMesh | None) -> None:
        self.config, self.mesh = config, mesh
        self.per_row, self.per_batch = config.aux_loss == "sequence", config.aux_loss == "global_batch"
        self._pooled = config.aux_loss == "huggingface"

    # ---- tables ------------------------------------------------------------------------------------------------

    def shape(self, groups: int) -> tuple[int, int, int]:
        """Returns the shape of the tables of all layers together, ``[L, S, E]``."""
        return 1 if self._pooled else self.config.num_moe_layers, 2 * groups + 1, self.config.num_experts

    def add(self, tables_LSE: Tensor, index: int, table_SE: Tensor) -> Tensor:
        """Adds the table of one layer to the tables of all layers.

        Args:
            tables_LSE: Tables of all layers, filled up to the previous layer.
            index: The layer's number in the whole model.
            table_SE: Table of this layer.
        """
        if self._pooled:
            return tables_LSE + table_SE
        place = sum(self.config.is_moe_layer(i) for i in range(index))
        return tables_LSE + F.pad(table_SE.unsqueeze(0), (0, 0, 0, 0, place, tables_LSE.shape[0] - place - 1))

    def join(self, tables: Sequence[Tensor]) -> Tensor:
        """Joins the tables of all layers, given in order."""
        tables_LSE = torch.stack(list(tables))
        return tables_LSE.sum(0, keepdim=True) if self._pooled else tables_LSE

    # ---- losses ------------------------------------------------------------------------------------------------

    def slope(self, tables_LSE: Tensor) -> Tensor:
        """Computes the slope of the load-balancing loss, before division by the number of groups. Collective over a group's ranks.

        Args:
            tables_LSE: Tables of this rank's tokens.

        Returns:
            The slope, ``[L, G, E]``. Multiplied by the probabilities and summed, it gives the loss of all groups in
            which this rank has tokens.
        """
        counts_LGE = split_table(tables_LSE.detach())[0].contiguous()
        if self.mesh is not None:
            for axis in (self.mesh.tp, self.mesh.axis("cp")) if self.per_row else (self.mesh.stage,):
                comm.all_reduce_raw(counts_LGE, axis)
        return self.slope_of(counts_LGE)

    def slope_of(self, counts_LGE: Tensor) -> Tensor:
        """Computes the slope from the counts of all tokens of the groups."""
        return balance_slope(counts_LGE, self.config.num_experts_per_tok) / counts_LGE.shape[0]

    def balance(self, tables_LSE: Tensor, slope_LGE: Tensor) -> Tensor:
        """Computes the load-balancing loss of the tables' tokens, summed over groups."""
        return (slope_LGE * split_table(tables_LSE)[1]).sum()

    def z(self, tables_LSE: Tensor) -> Tensor:
        """Computes the z-loss of the tables' tokens, summed over tokens."""
        return split_table(tables_LSE)[2].sum() / max(self.config.num_moe_layers, 1)

# SPDX-License-Identifier: Apache-2.0
"""The routing statistics of a layer for this rank's tokens: one small table, from which the losses of routers are computed.

A *group* is a set of tokens over which the load-balancing loss is computed: a micro-batch, a row, or all tokens (the
batch says which). The table has two rows for each group, with the choices of each expert and the sums of their
probabilities, and a last row that begins with the sum of ``logsumexp(logits)^2``::

    [counts; probabilities; z]    [2 G + 1, E]

It is float64, in which counts are exact, and differentiable except for the counts.

Legend: T tokens, E experts, K experts per token, G groups, S = 2 G + 1 rows of a table.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_moefold.comm import linear
from lightning_moefold.kernels.float32 import exact_linear
from lightning_moefold.modules.routers.router import RouterOutput
from lightning_moefold.modules.sequence import SequenceBatch


def count_choices(expert_TK: Tensor, num_experts: int, batch: SequenceBatch) -> Tensor:
    """Counts how often each expert is chosen by tokens that count, ``[G, E]`` int64; never waits for the device."""
    bin_TK = expert_TK
    if batch.group_T is not None:
        bin_TK = expert_TK + batch.group_T.unsqueeze(-1) * num_experts
    weight_TK = torch.ones_like(expert_TK)
    if batch.counted_T is not None:
        weight_TK = weight_TK * batch.counted_T.unsqueeze(-1)
    counts = torch.zeros(batch.num_groups * num_experts, dtype=torch.int64, device=expert_TK.device)
    return counts.scatter_add_(0, bin_TK.reshape(-1), weight_TK.reshape(-1)).view(batch.num_groups, num_experts)


def routing_table(routed: RouterOutput, counts_GE: Tensor, batch: SequenceBatch) -> Tensor:
    """Computes the table of a layer, ``[2 G + 1, E]``."""
    probability_TE = routed.probability_TE
    if batch.counted_T is not None:
        probability_TE = probability_TE * batch.counted_T.unsqueeze(-1)
    if batch.group_T is None and batch.num_groups == 1:
        probability_GE = probability_TE.sum(0, keepdim=True)
    else:
        group_T = routed.expert_TK.new_zeros(len(probability_TE)) if batch.group_T is None else batch.group_T
        probability_GE = sum_of_groups(probability_TE, group_T, batch.num_groups)
    z = probability_GE.new_zeros(())
    if batch.wants_z_loss:
        z_T = routed.logits_TE.logsumexp(-1).square()
        z = (z_T if batch.counted_T is None else z_T * batch.counted_T).sum()
    z_1E = F.pad(z.view(1, 1), (0, counts_GE.shape[1] - 1))
    return torch.cat([counts_GE.double(), probability_GE.double(), z_1E.double()])


def sum_of_groups(x_TE: Tensor, group_T: Tensor, groups: int) -> Tensor:
    """Sums the rows of each group, ``[T, E] -> [G, E]``; to the same bits in every run, unlike ``index_add`` on CUDA.

    Args:
        x_TE: Rows, in at least float32.
        group_T: The group of each row.
        groups: G.
    """
    total = _by_product if x_TE.is_cuda else _by_index
    return linear(x_TE, lambda x: total(x, group_T, groups), lambda grad_GE: grad_GE.index_select(0, group_T))


def _by_index(x_TE: Tensor, group_T: Tensor, groups: int) -> Tensor:
    return x_TE.new_zeros(groups, x_TE.shape[1]).index_add_(0, group_T, x_TE)


def _by_product(x_TE: Tensor, group_T: Tensor, groups: int) -> Tensor:
    member_GT = group_T == torch.arange(groups, device=group_T.device).unsqueeze(1)
    with torch.autocast(x_TE.device.type, enabled=False):  # it would sum in 16 bits
        return exact_linear(member_GT.to(x_TE.dtype), x_TE.t())


def split_table(table_SE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Splits tables into counts ``[..., G, E]``, probabilities ``[..., G, E]`` and the sum of z ``[...]``."""
    groups = table_SE.shape[-2] // 2
    counts_GE, probability_GE, z_1E = table_SE.split([groups, groups, 1], dim=-2)
    return counts_GE, probability_GE, z_1E[..., 0, 0]


def filled_groups(counts_LGE: Tensor) -> Tensor:
    """Returns the number of groups in which any token counts.

    A short last batch may leave micro-batches without such tokens; these are left out of means over groups.

    Args:
        counts_LGE: Choices of all tokens of the groups, summed over ranks.
    """
    return (counts_LGE.sum((0, 2)) > 0).sum()


def balance_slope(counts_GE: Tensor, top_k: int) -> Tensor:
    """Returns ``E f_e / n`` for each group of n tokens; times the summed probabilities, this is the group's balancing loss.

        loss of a group = E * sum_e f_e * P_e

    where ``f_e`` are the choices of expert e and ``P_e`` is its summed probability, each divided by n (Switch
    Transformer, arXiv 2101.03961, equation 4, for top-k). The balanced value is K. An empty group has no loss.

    Args:
        counts_GE: Choices of all tokens of the groups, summed over ranks; float64.
        top_k: Number of experts per token, K.
    """
    tokens_G1 = (counts_GE.sum(-1, keepdim=True) / top_k).clamp(min=1)
    return counts_GE / tokens_G1.square() * counts_GE.shape[-1]

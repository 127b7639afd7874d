# SPDX-License-Identifier: Apache-2.0
"""Token dropping: which choices an expert serves when it has a capacity.

Capacity is counted per row (a sequence), so it does not depend on how rows are dealt to data ranks, nor on micro-batches:

    C = min(L, ceil(capacity_factor * k * L / E))        L tokens of the row, padding left out

With scope ``"full_sequence"`` a row that is cut over tp and cp is ranked as a whole: each rank contributes one integer
and one probability per choice to an all-gather over tp and one over cp, and every rank finds the same answer.

Legend: T tokens of this rank, G tokens of the cp x tp group, K experts per token, w 32-bit words of a score, B rows, E
experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_moefold import comm
from lightning_moefold.dispatch.config import DispatchConfig
from lightning_moefold.mesh import SINGLE, Axis


def comparable(score: Tensor) -> Tensor:
    """Scores rounded to half of their bits (Dekker, 1971), by which *tokens* are compared.

    Tokens of one row may be alike but for rounding, such as the first ones of its documents, or a first one that is
    repeated. Under another fold it would be rounding that says which of them is better; so they are equal, and position
    decides.
    """
    high = score * (2.0 ** (27 if score.dtype == torch.float64 else 12) + 1)
    return high - (high - score)


def rank_within(key_N: Tensor, score_N: Tensor | None, position_N: Tensor, bins: int) -> Tensor:
    """Place of each item among those of its key: by score descending, then by position ascending; ``[N]``, from 0.

    Args:
        key_N: Key of each item, int64, below ``bins``.
        score_N: The higher, the earlier; None to go by position alone.
        position_N: The lower, the earlier.
        bins: Number of keys.
    """
    order_N = position_N.argsort(stable=True)
    if score_N is not None:
        order_N = order_N[score_N[order_N].argsort(descending=True, stable=True)]
    order_N = order_N[key_N[order_N].argsort(stable=True)]
    counts = torch.zeros(bins, dtype=torch.int64, device=key_N.device).scatter_add_(0, key_N, torch.ones_like(key_N))
    start = counts.cumsum(0) - counts
    place_N = torch.empty_like(order_N)
    place_N[order_N] = torch.arange(len(order_N), device=key_N.device) - start[key_N[order_N]]
    return place_N


def within_capacity(
    expert_TK: Tensor,
    score_TK: Tensor,
    row_T: Tensor,
    position_T: Tensor,
    real_T: Tensor | None,
    rows: int,
    num_experts: int,
    config: DispatchConfig,
) -> Tensor:
    """Which choices are served, ``[T, K]``, among tokens that are all here.

    Arguments are those of :func:`keep_within_capacity`, whose ``place`` is here the row and position of each of these tokens, and
    the number of rows.
    """
    assert config.capacity_factor is not None
    tokens, k = expert_TK.shape
    key_TK = row_T.unsqueeze(1) * num_experts + expert_TK
    count_T = torch.ones(tokens, dtype=torch.int64, device=expert_TK.device)
    if real_T is not None:
        key_TK = key_TK.masked_fill(~real_T.unsqueeze(1), rows * num_experts)
        count_T = real_T.long()
    length_B = torch.zeros(rows, dtype=torch.int64, device=expert_TK.device).scatter_add_(0, row_T, count_T)
    capacity_B = (config.capacity_factor * k * length_B.double() / num_experts).ceil().long().minimum(length_B)
    place_N = rank_within(
        key_TK.flatten(),
        comparable(score_TK.flatten()) if config.drop_policy == "probs" else None,
        position_T.repeat_interleave(k),
        rows * num_experts + 1,
    )
    kept_TK = place_N.view(tokens, k) < capacity_B[row_T].unsqueeze(1)
    return kept_TK if real_T is None else kept_TK & real_T.unsqueeze(1)


def keep_within_capacity(
    expert_TK: Tensor,
    score_TK: Tensor,
    place: tuple[Tensor, Tensor, int],
    real_T: Tensor | None,
    num_experts: int,
    config: DispatchConfig,
    tp: Axis = SINGLE,
    cp: Axis = SINGLE,
) -> Tensor:
    """Which of this rank's choices are served, ``[T, K]``. Collective over tp and cp under ``"full_sequence"``.

    Args:
        expert_TK: Chosen experts.
        score_TK: The router's probability of each choice.
        place: Row and position of each token of the cp x tp group, ``[G]`` in the order of an all-gather over tp and then
            over cp, and the number of rows.
        real_T: False for padding, which is served nowhere; None if there is none.
        num_experts: E.
        config: Capacity factor, policy and scope.
        tp: Tensor parallel axis.
        cp: Context parallel axis.
    """
    row_G, position_G, rows = place
    tokens = expert_TK.shape[0]
    first = (cp.index * tp.size + tp.index) * tokens
    with torch.no_grad():
        if config.drop_scope == "sub_sequence":  # all of this rank's tokens are one row
            position_T = torch.arange(tokens, device=expert_TK.device)
            row_T = torch.zeros_like(position_T)
            return within_capacity(expert_TK, score_TK, row_T, position_T, real_T, 1, num_experts, config)
        if tp.size * cp.size == 1:
            return within_capacity(expert_TK, score_TK, row_G, position_G, real_T, rows, num_experts, config)
        marked_TK = expert_TK if real_T is None else expert_TK.masked_fill(~real_T.unsqueeze(1), num_experts)
        bits_TKw = score_TK.contiguous().unsqueeze(-1).view(torch.int32)
        packed = torch.cat([marked_TK.to(torch.int32).unsqueeze(2), bits_TKw], dim=2)
        packed = comm.all_gather_raw(comm.all_gather_raw(packed, tp), cp)
        expert_GK = packed[:, :, 0].long()
        score_GK = packed[:, :, 1:].clone(memory_format=torch.contiguous_format).view(score_TK.dtype).squeeze(2)
        real_G = expert_GK[:, 0] < num_experts
        expert_GK = expert_GK.clamp(max=num_experts - 1)
        kept_GK = within_capacity(expert_GK, score_GK, row_G, position_G, real_G, rows, num_experts, config)
        return kept_GK[first : first + tokens]

# SPDX-License-Identifier: Apache-2.0
"""Gated experts whose adapters drop inputs in training.

What is dropped depends on the place of the token, the call and the layer, and not on the expert: experts of a token drop the same
inputs. So a token travels to its experts with one number, as further columns of its row, from which they make their masks;
exchanges only copy rows, and no dispatcher knows of it.

An expert after the other, by torch's own gradients: slower than :mod:`.kernels`, which computes experts without dropout.

Legend: T tokens of this rank, A tokens that arrived, M rows in expert order, L local experts, D hidden size, F expert width, R
rank of an adapter, c rows of one expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_moefold.dispatch import ExpertRows
from lightning_moefold.kernels.dropout import drop_by
from lightning_moefold.kernels.noise import hashed
from lightning_moefold.modules.experts.kernels import ExpertLoRA, Stack, read_tokens, sum_rows
from lightning_moefold.modules.experts.products import host_counts
from lightning_moefold.modules.lora import Places
from lightning_moefold.modules.quantized import CodedStack, product

#: Without these bits a number is finite, whichever of the dtypes it is read as.
_FINITE = ~0x4000_4000_4000_4000


class Drop(NamedTuple):
    """What the experts of a pass drop.

    Args:
        probability: Of an input.
        key_A: Number of each token.
        first: Number of this rank's first channel of an expert.
    """

    probability: float
    key_A: Tensor
    first: int


def with_keys(x_TD: Tensor, key: int, places: Places) -> Tensor:
    """Appends a number for each token to its row, in 8 bytes: from its place, the call, and ``key`` of the layer."""
    key_T = hashed(key, *places()) & _FINITE
    return torch.cat([x_TD, key_T.unsqueeze(1).view(x_TD.dtype)], dim=1)


def without_keys(x_AX: Tensor, hidden_size: int) -> tuple[Tensor, Tensor]:
    """Takes them off again: rows ``[A, D]``, and the numbers ``[A]``."""
    return x_AX[:, :hidden_size].contiguous(), x_AX.detach()[:, hidden_size:].contiguous().view(torch.int64).squeeze(1)


def dropping_experts(
    x_AD: Tensor,
    rows: ExpertRows,
    activation: Callable[[Tensor], Tensor],
    stacks: tuple[Stack, Stack, Stack],
    lora: ExpertLoRA,
    drop: Drop,
) -> Tensor:
    """As :func:`.kernels.gated_experts`. Experts without rows compute none, so that all have a gradient."""
    counts, x_MD = host_counts(rows), read_tokens(x_AD, rows)
    if not counts:  # in a pass with copies of experts, none of which is here; their gradients travel all the same
        numbers = [stack for stack in (*stacks, *lora[:5]) if isinstance(stack, Tensor)]
        return sum_rows(x_MD * torch.stack([stack.sum() for stack in numbers]).sum(), rows, x_AD.shape[0])
    key_M = drop.key_A if rows.token_M is None else drop.key_A[rows.token_M]
    parts = zip(
        x_MD.split(counts), key_M.split(counts), rows.weight_M.split(counts),
        *map(_matrices, stacks), *(stack.unbind() for stack in lora[:5]), strict=True,
    )  # fmt: skip
    y_MD = torch.cat([_one(activation, lora.scale, drop, *part) for part in parts])
    return sum_rows(y_MD, rows, x_AD.shape[0])


Times = Callable[[Tensor], Tensor]


def _matrices(stack: Stack) -> list[Times]:
    """Products with the matrix of each expert."""
    if isinstance(stack, CodedStack):
        return [lambda x, e=e: product(x, lambda _: stack[e]) for e in range(stack.shape[0])]  # type: ignore[misc]
    return [lambda x, w=w: F.linear(x, w) for w in stack.unbind()]  # type: ignore[misc]


def _one(
    activation: Callable[[Tensor], Tensor],
    scale: float,
    drop: Drop,
    x_cD: Tensor,
    key_c: Tensor,
    weight_c: Tensor,
    gate: Times,
    up: Times,
    down: Times,
    up_A_RD: Tensor,
    gate_B_FR: Tensor,
    up_B_FR: Tensor,
    down_A_RF: Tensor,
    down_B_DR: Tensor,
) -> Tensor:
    z_cR = scale * F.linear(drop_by(x_cD, hashed(key_c, 1), drop.probability, 0), up_A_RD)
    inner_cF = activation(gate(x_cD) + F.linear(z_cR, gate_B_FR)) * (up(x_cD) + F.linear(z_cR, up_B_FR))
    v_cR = scale * F.linear(drop_by(inner_cF, hashed(key_c, 2), drop.probability, drop.first), down_A_RF)
    y_cD = down(inner_cF) + F.linear(v_cR, down_B_DR)
    return (y_cD * weight_c.unsqueeze(1)).to(x_cD.dtype)

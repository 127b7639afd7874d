# SPDX-License-Identifier: Apache-2.0
"""Rows as dispatchers hand them to experts, and a loop over them; for the CPU and for a CUDA device."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_moefold.dispatch import ExpertRows
from lightning_moefold.modules.experts.kernels import Activation

COUNTS = [[0, 5, 0, 3, 1, 0], [9, 0], [4, 4], [0, 0, 0]]


def make_rows(counts: list[int], kind: str, device: str = "cpu") -> tuple[int, ExpertRows]:
    """Number of tokens, and rows that read each token once (in order or not), or some often and others never."""
    generator = torch.Generator().manual_seed(sum(counts))
    rows = sum(counts)
    weight = torch.rand(rows, generator=generator, dtype=torch.float64).to(device)
    counts_L = torch.tensor(counts, device=device)
    if kind == "in order":
        return rows, ExpertRows(None, weight, counts_L, True)
    if kind == "permuted":
        return rows, ExpertRows(torch.randperm(rows, generator=generator).to(device), weight, counts_L, True)
    # An expert reads a token once at most, as with top-k.
    token = [torch.randperm(max(counts) + 2, generator=generator)[:n] for n in counts]
    return max(counts) + 2, ExpertRows(torch.cat(token).to(device), weight, counts_L, False, counts)


def by_loop(x_AD: Tensor, rows: ExpertRows, activation: Activation, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Row by row, under plain autograd."""
    expert = torch.arange(len(gate)).repeat_interleave(rows.counts_L.cpu())
    y = [torch.zeros_like(x) for x in x_AD]
    for m, e in enumerate(expert.tolist()):
        a = m if rows.token_M is None else int(rows.token_M[m])
        y[a] = y[a] + rows.weight_M[m] * (down[e] @ (activation(gate[e] @ x_AD[a]) * (up[e] @ x_AD[a])))
    return torch.stack(y) if y else torch.zeros_like(x_AD)

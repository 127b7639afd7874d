# SPDX-License-Identifier: Apache-2.0
"""The routed experts of a layer, stored as stacks with an expert axis.

Legend: M rows in expert order, L local experts, D hidden size, F expert width (cut over etp).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_moefold.fold import Fold
from lightning_moefold.layout import Cut, Family, ParameterPlan, TensorGradient, even_split
from lightning_moefold.modules.base import ParallelModule, local
from lightning_moefold.modules.mlp import ACTIVATIONS

_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Experts(ParallelModule):
    """E gated feed-forward experts: ``down(act(gate(x)) * up(x))``, each on its own rows.

    Args:
        hidden_size: D.
        num_experts: E, spread evenly over ep.
        ffn_hidden_size: F.
        activation: A name in :data:`~.mlp.ACTIVATIONS`.
    """

    def __init__(self, hidden_size: int, num_experts: int, ffn_hidden_size: int, activation: str = "silu") -> None:
        super().__init__()
        self.num_experts, self.ffn_hidden_size = num_experts, ffn_hidden_size
        self.activation = ACTIVATIONS[activation]
        self.gate_proj = nn.Parameter(torch.empty(num_experts, ffn_hidden_size, hidden_size))
        self.up_proj = nn.Parameter(torch.empty(num_experts, ffn_hidden_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, ffn_hidden_size))
        for weight in (self.gate_proj, self.up_proj, self.down_proj):
            nn.init.normal_(weight, std=0.02)

    def plans(self, fold: Fold) -> dict[str, ParameterPlan]:
        """Experts over ep, their width over etp."""
        experts = Cut("ep", 0, even_split(self.num_experts, fold.ep))
        widths = even_split(self.ffn_hidden_size, fold.etp)
        wide, narrow = (
            ParameterPlan(Family.EXPERT, (experts, Cut("etp", dim, widths)), TensorGradient.SHARDED) for dim in (1, 2)
        )
        return {"gate_proj": wide, "up_proj": wide, "down_proj": narrow}

    def forward(self, x_MD: Tensor, counts_L: Tensor) -> Tensor:
        """``[M, D] -> [M, D]``, partial over etp.

        Args:
            x_MD: Rows in expert order.
            counts_L: Rows of each local expert, int64; their sum is M.
        """
        gate_LFD, up_LFD, down_LDF = local(self.gate_proj), local(self.up_proj), local(self.down_proj)
        matmul = grouped_matmul if _grouped_kernel_takes(x_MD, gate_LFD) else looped_matmul
        inner_MF = self.activation(matmul(x_MD, gate_LFD, counts_L)) * matmul(x_MD, up_LFD, counts_L)
        return matmul(inner_MF, down_LDF, counts_L)


def _grouped_kernel_takes(x_MD: Tensor, weight_LFD: Tensor) -> bool:
    """grouped_mm has no float64, and rows of all operands must be multiples of 16 bytes."""
    aligned = all(n * x_MD.element_size() % 16 == 0 for n in weight_LFD.shape[1:])
    return x_MD.dtype in _GROUPED_DTYPES and aligned and x_MD.shape[0] > 0


def grouped_matmul(x_MK: Tensor, weight_LNK: Tensor, counts_L: Tensor) -> Tensor:
    """Row block l of ``x`` times ``weight[l]^T`` in one kernel: ``[M, K] -> [M, N]``."""
    ends_L = counts_L.cumsum(0).to(torch.int32)
    return F.grouped_mm(x_MK, weight_LNK.transpose(1, 2), offs=ends_L)


def looped_matmul(x_MK: Tensor, weight_LNK: Tensor, counts_L: Tensor) -> Tensor:
    """The same by a loop, for dtypes and shapes the kernel does not take; waits for the counts.

    ``unbind`` and not ``weight[l]``: the backward of an index writes a full-size gradient for every expert.
    """
    parts = zip(x_MK.split(counts_L.tolist()), weight_LNK.unbind(0), strict=True)
    return torch.cat([x @ weight.t() for x, weight in parts])

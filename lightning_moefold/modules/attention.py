# SPDX-License-Identifier: Apache-2.0
"""Grouped-query attention, cut over tensor parallel ranks at head borders.

Query heads are split as evenly as possible. Where tp divides the key/value heads, those are split alike. Where it does
not, the K/V weights are replicated: each rank projects just the key/value heads its queries need, and the gradients are
partial (summed over tp).

Legend: N tokens, B rows, S positions, D hidden size, d head size, Q local query heads, V local key/value heads.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_moefold.fold import Fold
from lightning_moefold.layout import Cut, ParameterPlan, TensorGradient, even_split
from lightning_moefold.mesh import SINGLE, FoldedMesh
from lightning_moefold.modules.base import Linear, ParallelModule, local
from lightning_moefold.modules.norm import RMSNorm
from lightning_moefold.modules.rotary import rotary_tables, rotate
from lightning_moefold.modules.sequence import SequenceBatch


class Attention(ParallelModule):
    """Causal multi-head attention with fewer key/value heads than query heads.

    Args:
        hidden_size: D.
        num_heads: Query heads of the whole layer.
        num_kv_heads: Key/value heads of the whole layer; divides ``num_heads``.
        head_dim: d; ``hidden_size / num_heads`` by default.
        qkv_bias: Biases on the three input projections.
        output_bias: Bias on the output projection.
        qk_norm_eps: RMS-normalise each query and key head (Qwen3) with this epsilon; None for no normalisation.
        sliding_window: A query sees at most this many keys, itself included.
        rope_theta: Rotary base used where :meth:`forward` is called without a batch description.

    Raises:
        ValueError: If the key/value heads do not divide the query heads.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        qkv_bias: bool = False,
        output_bias: bool = False,
        qk_norm_eps: float | None = None,
        sliding_window: int | None = None,
        rope_theta: float = 10000.0,
    ) -> None:
        super().__init__()
        num_kv_heads = num_kv_heads or num_heads
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads={num_kv_heads} does not divide num_heads={num_heads}; use a divisor of it.")
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = head_dim or hidden_size // num_heads
        self.sliding_window, self.rope_theta = sliding_window, rope_theta
        self.q_proj = Linear(hidden_size, num_heads * self.head_dim, qkv_bias)
        self.k_proj = Linear(hidden_size, num_kv_heads * self.head_dim, qkv_bias)
        self.v_proj = Linear(hidden_size, num_kv_heads * self.head_dim, qkv_bias)
        self.o_proj = Linear(num_heads * self.head_dim, hidden_size, output_bias)
        self.q_norm = None if qk_norm_eps is None else RMSNorm(self.head_dim, qk_norm_eps)
        self.k_norm = None if qk_norm_eps is None else RMSNorm(self.head_dim, qk_norm_eps)
        self.tp = SINGLE
        self._place_heads()

    def _place_heads(self) -> None:
        """Which query and key/value heads are computed on this rank."""
        split = even_split(self.num_heads, self.tp.size)
        first = sum(split[: self.tp.index])
        share = self.num_heads // self.num_kv_heads
        heads = range(first, first + split[self.tp.index])
        needed = sorted({head // share for head in heads})
        self.local_heads = len(heads)
        self.kv_first, self.kv_heads = needed[0], len(needed)
        self.kv_cut = self.num_kv_heads % self.tp.size == 0
        # The kernel's own grouping needs each key/value head to serve the same number of consecutive local queries.
        kv_of_head = [head // share - self.kv_first for head in heads]
        grouped = self.local_heads % self.kv_heads == 0
        regular = grouped and kv_of_head == [i // (self.local_heads // self.kv_heads) for i in range(self.local_heads)]
        self.kv_of_head: list[int] | None = None if regular else kv_of_head

    def bind(self, mesh: FoldedMesh) -> None:
        """Takes the tensor parallel axis."""
        self.tp = mesh.tp
        self._place_heads()

    def plans(self, fold: Fold) -> dict[str, ParameterPlan]:
        """Rows of q (and k, v where tp divides their heads) and columns of o, at head borders."""
        d = self.head_dim
        q_sizes = tuple(n * d for n in even_split(self.num_heads, fold.tp))
        q_rows = ParameterPlan(cuts=(Cut("tp", 0, q_sizes),), gradient=TensorGradient.SHARDED)
        plans = {"q_proj.weight": q_rows, "o_proj.weight": ParameterPlan(cuts=(Cut("tp", 1, q_sizes),), gradient=TensorGradient.SHARDED)}
        if self.q_proj.bias is not None:
            plans["q_proj.bias"] = q_rows
        if self.num_kv_heads % fold.tp == 0:
            kv_sizes = tuple(n * d for n in even_split(self.num_kv_heads, fold.tp))
            kv_rows = ParameterPlan(cuts=(Cut("tp", 0, kv_sizes),), gradient=TensorGradient.SHARDED)
            plans |= {f"{name}.weight": kv_rows for name in ("k_proj", "v_proj")}
            if self.k_proj.bias is not None:
                plans |= {f"{name}.bias": kv_rows for name in ("k_proj", "v_proj")}
        return plans

    def forward(self, hidden: Tensor, batch: SequenceBatch | None = None) -> Tensor:
        """Attention over each row.

        Args:
            hidden: This rank's tokens ``[T, D]``; without ``batch``, whole rows ``[B, S, D]`` at positions 0, 1, ...
            batch: Shape, positions and masks.

        Returns:
            A tensor of the shape of ``hidden``.
        """
        if batch is None:
            return self._forward_rows(hidden)
        x_ND = batch.gather(hidden)
        rows, length = batch.rows, batch.length
        q_BSQd = self._heads(self.q_proj(x_ND), rows, length, self.q_norm, batch)
        k_BSVd = self._heads(self._project_kv(self.k_proj, x_ND), rows, length, self.k_norm, batch)
        v_BSVd = self._project_kv(self.v_proj, x_ND).view(rows, length, self.kv_heads, self.head_dim)
        y_NO = self._attend(q_BSQd, k_BSVd, v_BSVd, batch)
        y_TD = batch.reduce_scatter(F.linear(y_NO, local(self.o_proj.weight)))
        # The bias is added once, to each rank's own tokens, after the sum over tp.
        return y_TD if self.o_proj.bias is None else y_TD + local(self.o_proj.bias)

    def _forward_rows(self, x_BSD: Tensor) -> Tensor:
        rows, length, _ = x_BSD.shape
        position_1S = torch.arange(length, device=x_BSD.device).unsqueeze(0)
        cos, sin = rotary_tables(position_1S, self.head_dim, self.rope_theta, x_BSD.dtype)
        return self(x_BSD.flatten(0, 1), SequenceBatch(rows, length, cos, sin)).view_as(x_BSD)

    def _heads(self, x_NO: Tensor, rows: int, length: int, norm: RMSNorm | None, batch: SequenceBatch) -> Tensor:
        x_BSHd = x_NO.view(rows, length, -1, self.head_dim)
        if norm is not None:
            x_BSHd = norm(x_BSHd)
        if batch.cos_BSh is not None and batch.sin_BSh is not None:
            x_BSHd = rotate(x_BSHd, batch.cos_BSh, batch.sin_BSh)
        return x_BSHd

    def _project_kv(self, projection: Linear, x_ND: Tensor) -> Tensor:
        if self.kv_cut:
            return projection(x_ND)
        rows = slice(self.kv_first * self.head_dim, (self.kv_first + self.kv_heads) * self.head_dim)
        bias = None if projection.bias is None else local(projection.bias)[rows]
        return F.linear(x_ND, local(projection.weight)[rows], bias)

    def _attend(self, q_BSQd: Tensor, k_BSVd: Tensor, v_BSVd: Tensor, batch: SequenceBatch) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q_BSQd, k_BSVd, v_BSVd))
        if self.kv_of_head is not None:
            index = torch.tensor(self.kv_of_head, device=k.device)
            k, v = k.index_select(1, index), v.index_select(1, index)
        mask = batch.mask_for(self.sliding_window, q.device)
        y_BQSd = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
        )
        return y_BQSd.transpose(1, 2).reshape(batch.tokens, self.local_heads * self.head_dim)

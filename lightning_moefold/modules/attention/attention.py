# SPDX-License-Identifier: Apache-2.0
"""Grouped-query attention, cut over tensor parallel ranks at head borders.

Query heads are split as evenly as possible. If tp divides the query (or the key/value) heads, the weights of their
projections are cut too. Otherwise these weights are replicated: each rank uses only the rows of its own query heads, or
of the key/value heads that they need, and the gradients are partial (summed over tp).

Legend: N tokens, B rows, S positions, D hidden size, d head size, Q local query heads, V local key/value heads.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_moefold import comm
from lightning_moefold.errors import InputError
from lightning_moefold.fold import Fold
from lightning_moefold.kernels import rotate
from lightning_moefold.layout import Cut, ParameterPlan, TensorGradient, even_split
from lightning_moefold.mesh import FoldedMesh
from lightning_moefold.modules.attention.backends import without_cudnn
from lightning_moefold.modules.attention.blockwise import Seen, Span
from lightning_moefold.modules.attention.context import context_attention, find_runs_of
from lightning_moefold.modules.attention.rotary import rotary_tables
from lightning_moefold.modules.base import Linear, ParallelRoot, column_plans, local, placed, row_plans
from lightning_moefold.modules.norm import RMSNorm
from lightning_moefold.modules.sequence import SequenceBatch
from lightning_moefold.modules.standalone import run_standalone

#: The longest row for which a whole mask is built; longer rows are computed block by block.
_WHOLE_MASK = 4096


class Attention(ParallelRoot):
    """Multi-head attention with fewer key/value heads than query heads.

    Args:
        hidden_size: Size of hidden states, D.
        num_heads: Number of query heads of the whole layer.
        num_kv_heads: Number of key/value heads of the whole layer, a divisor of ``num_heads``; by default
            ``num_heads``.
        head_dim: Size of a head, d; by default ``hidden_size / num_heads``.
        qkv_bias: Whether the three input projections have biases.
        output_bias: Whether the output projection has a bias.
        qk_norm_eps: Epsilon of the RMSNorm of each query and key head (Qwen3); None for no normalisation.
        sliding_window: Number of keys that a query sees at most, itself included; None for all.
        rope_theta: Base of the rotary frequencies if :meth:`forward` is called without a batch description; None for no
            rotary embedding.
        causal: Whether a query sees only keys up to its own position. Non-causal attention (as in a vision transformer)
            is for custom networks and takes no masks.

    Raises:
        ValueError: If the key/value heads do not divide the query heads, a window is combined with ``causal=False``, or
            rotary positions with an odd head size.
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
        rope_theta: float | None = 10000.0,
        causal: bool = True,
    ) -> None:
        super().__init__()
        num_kv_heads = num_kv_heads or num_heads
        if num_heads % num_kv_heads:
            raise InputError(f"num_kv_heads={num_kv_heads} does not divide num_heads={num_heads}; use a divisor of it.")
        if sliding_window is not None and not causal:
            raise InputError(f"sliding_window={sliding_window} needs causal=True; leave the window out.")
        self.hidden_size, self.causal = hidden_size, causal
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = head_dim or hidden_size // num_heads
        if rope_theta is not None and self.head_dim % 2:
            raise InputError(
                f"head_dim={self.head_dim} is odd, but rotary positions need pairs of numbers; use an even one, or rope_theta=None."
            )
        self.sliding_window, self.rope_theta = sliding_window, rope_theta
        self.q_proj = Linear(hidden_size, num_heads * self.head_dim, qkv_bias)
        self.k_proj = Linear(hidden_size, num_kv_heads * self.head_dim, qkv_bias)
        self.v_proj = Linear(hidden_size, num_kv_heads * self.head_dim, qkv_bias)
        self.o_proj = Linear(num_heads * self.head_dim, hidden_size, output_bias)
        self.q_norm = None if qk_norm_eps is None else RMSNorm(self.head_dim, qk_norm_eps)
        self.k_norm = None if qk_norm_eps is None else RMSNorm(self.head_dim, qk_norm_eps)
        self._place_heads()

    def _place_heads(self) -> None:
        """Determines which query and key/value heads this rank computes."""
        split = even_split(self.num_heads, self.tp.size)
        first = sum(split[: self.tp.index])
        share = self.num_heads // self.num_kv_heads
        heads = range(first, first + split[self.tp.index])
        needed = sorted({head // share for head in heads})
        self.local_heads = len(heads)
        self.kv_heads = len(needed)
        d = self.head_dim
        # The rows of the stored weights that this rank uses; None for all.
        self._q_rows = None if self.num_heads % self.tp.size == 0 else slice(first * d, (first + self.local_heads) * d)
        self._kv_rows = None if self.num_kv_heads % self.tp.size == 0 else slice(needed[0] * d, (needed[-1] + 1) * d)
        # The kernel's own grouping requires that each key/value head serves the same number of consecutive local
        # queries.
        kv_of_head = [head // share - needed[0] for head in heads]
        grouped = self.local_heads % self.kv_heads == 0
        regular = grouped and kv_of_head == [i // (self.local_heads // self.kv_heads) for i in range(self.local_heads)]
        self.kv_of_head: list[int] | None = None if regular else kv_of_head

    def bind(self, mesh: FoldedMesh) -> None:
        """Receives the tensor parallel axis, and determines which heads this rank computes."""
        super().bind(mesh)
        self._place_heads()
        if isinstance(self.o_proj, Linear) and self._q_rows is None:
            self.o_proj.lora_inputs = self.tp

    def plans(self, fold: Fold) -> dict[str, ParameterPlan]:
        """Cuts rows of q, k, v and columns of o, each if tp divides its heads."""
        fold.check_heads("num_heads", self.num_heads)
        plans: dict[str, ParameterPlan] = {}
        for names, heads in ((("q_proj",), self.num_heads), (("k_proj", "v_proj"), self.num_kv_heads)):
            if heads % fold.tp:
                continue
            sizes = (heads // fold.tp * self.head_dim,) * fold.tp
            rows, columns = (
                ParameterPlan(cuts=(Cut("tp", dim, sizes),), gradient=TensorGradient.SHARDED) for dim in (0, 1)
            )
            for name in names:
                plans |= row_plans(self.get_submodule(name), name, rows)
            if "q_proj" in names:
                plans |= column_plans(self.o_proj, "o_proj", columns)
        return plans

    def forward(self, hidden: Tensor, batch: SequenceBatch | None = None) -> Tensor:
        """Computes attention over each row.

        Args:
            hidden: This rank's tokens ``[T, D]``; without ``batch``, whole rows ``[B, S, D]`` at positions 0, 1, ..., the
                same on every tp rank.
            batch: Description of shape, positions and masks.

        Returns:
            A tensor of the shape of ``hidden``.
        """
        if batch is None:
            return run_standalone(self, hidden, self.batch_of(hidden, self.compute_dtype))
        x_ND = batch.gather(hidden)
        rows, length, places = batch.rows, batch.length, batch.all_tokens(hidden.device)
        q_ND = self.q_proj(x_ND, self._q_rows, **placed(self.q_proj, places))
        k_ND, v_ND = (part(x_ND, self._kv_rows, **placed(part, places)) for part in (self.k_proj, self.v_proj))
        q_BSQd = self._heads(q_ND, rows, length, self.q_norm, batch)
        k_BSVd = self._heads(k_ND, rows, length, self.k_norm, batch)
        v_BSVd = v_ND.view(rows, length, self.kv_heads, self.head_dim)
        qkv = q_BSQd, k_BSVd, v_BSVd
        y_NO = self._attend(*qkv, batch) if self.is_one_kernel(batch) else comm.uncompiled(self._attend, *qkv, batch)
        y_TD = batch.reduce_scatter(self.o_proj(y_NO, columns=self._q_rows, bias=False, **placed(self.o_proj, places)))
        # The bias is added once, to each rank's own tokens, after the sum over tp.
        return y_TD if self.o_proj.bias is None else y_TD + local(self.o_proj.bias)

    def is_one_kernel(self, batch: SequenceBatch) -> bool:
        """Whether a single kernel without masks, chosen only by shapes, suffices, so that a compiled graph need not break."""
        return batch.cache is None and batch.layout.cp.size == 1 and batch.visibility(self.sliding_window).is_causal

    def batch_of(self, x_BSD: Tensor, compute_dtype: torch.dtype | None = None) -> SequenceBatch:
        """Describes whole rows of a custom network, at positions 0, 1, ...

        Args:
            x_BSD: The rows.
            compute_dtype: Data type of the computation; by default that of the rows.

        Raises:
            ValueError: If the tensor is not ``[B, S, D]``.
        """
        if x_BSD.dim() != 3:
            raise InputError(
                f"attention needs [rows, length, hidden size], not {list(x_BSD.shape)}; keep the rows apart."
            )
        rows, length, _ = x_BSD.shape
        cut = self.rows
        if cut is not None and length != cut.length:
            raise InputError(
                f"attention received {length} positions per row, but this context parallel rank holds {cut.length} of each row; "
                "layers between embed and head must keep the length of rows."
            )
        if cut is None:
            batch = SequenceBatch(rows, length, tp=self.tp)
        else:
            batch = SequenceBatch(rows, cut.layout.length, tp=self.tp, cp=cut.layout.cp)
            batch.exchange = cut.exchange
            if cut.is_padded and not self.causal:
                real_S = torch.arange(cut.layout.length, device=x_BSD.device) < cut.true_length
                batch.real_BS = real_S.expand(rows, -1)
        if self.rope_theta is not None:
            position_1L = batch.layout.positions(x_BSD.device).unsqueeze(0)
            dtype = compute_dtype or x_BSD.dtype
            batch.cos_BLh, batch.sin_BLh = rotary_tables(position_1L, self.head_dim, self.rope_theta, dtype)
        return batch

    def _heads(self, x_NO: Tensor, rows: int, length: int, norm: RMSNorm | None, batch: SequenceBatch) -> Tensor:
        x_BSHd = x_NO.view(rows, length, x_NO.shape[-1] // self.head_dim, self.head_dim)
        if norm is not None:
            x_BSHd = norm(x_BSHd)
        if batch.cos_BLh is not None and batch.sin_BLh is not None:
            x_BSHd = rotate(x_BSHd, batch.cos_BLh, batch.sin_BLh)
        return x_BSHd

    def _attend(self, q_BLQd: Tensor, k_BLVd: Tensor, v_BLVd: Tensor, batch: SequenceBatch) -> Tensor:
        earlier = None  # during generation, which of the cached keys each row sees
        if batch.cache is not None:
            k_BLVd, v_BLVd, earlier = batch.cache.extend(self, self.sliding_window, k_BLVd, v_BLVd)
        q, k, v = (x.transpose(1, 2) for x in (q_BLQd, *self._for_each_group(k_BLVd, v_BLVd)))
        visibility, layout = batch.visibility(self.sliding_window), batch.layout
        if earlier is not None:
            y_BQLd = _attend_to_row(q, k, v, earlier)
        elif layout.cp.size > 1 and not self.causal:
            y_BQLd = _attend_to_all_ranks(q, k, v, batch)
        elif layout.cp.size == 1 and (visibility.is_causal or not self.causal):
            y_BQLd = _attend_to_row(q, k, v, Seen.CAUSAL if self.causal else Seen.ALL)
        else:
            if torch.is_autocast_enabled(q.device.type):  # autocast does not cover custom functions
                q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
            short = layout.cp.size == 1 and layout.length <= _WHOLE_MASK
            if short and find_runs_of(q, layout, visibility) is None:
                y_BQLd = _attend_to_row(q, k, v, visibility.of(row := Span(0, layout.length), row, q.device))
            else:
                y_BQLd = context_attention(q, k, v, layout, visibility, batch.exchange)
        return y_BQLd.transpose(1, 2).reshape(batch.tokens, self.local_heads * self.head_dim)

    def _for_each_group(self, k_BLVd: Tensor, v_BLVd: Tensor) -> tuple[Tensor, Tensor]:
        """Returns keys and values such that each head serves the same number of consecutive query heads."""
        if self.kv_of_head is None:
            return k_BLVd, v_BLVd
        # By slices, because an index tensor would be copied to the device, and the host would wait.
        k, v = (torch.stack([x[:, :, head] for head in self.kv_of_head], dim=2) for x in (k_BLVd, v_BLVd))
        return k, v


def _attend_to_row(q: Tensor, k: Tensor, v: Tensor, seen: Seen | Tensor) -> Tensor:
    """Computes attention of whole rows in one kernel, ``[B, Q, S, d]``."""
    mask = seen if isinstance(seen, Tensor) else None
    flash = mask is None and q.dtype in (torch.bfloat16, torch.float16)
    if q.is_cuda and not flash and q.shape[1] != k.shape[1]:
        # On CUDA only the flash kernel (and the one that computes all scores) supports grouped heads; the next best
        # does not.
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    grouped = q.shape[1] != k.shape[1]
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=seen is Seen.CAUSAL, enable_gqa=grouped)
    with without_cudnn():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)


def _attend_to_all_ranks(q: Tensor, k: Tensor, v: Tensor, batch: SequenceBatch) -> Tensor:
    """Computes non-causal attention of rows cut over cp, ``[B, Q, L, d]``, for which the order of keys does not matter."""
    layout = batch.layout
    pair = comm.all_gather(torch.stack([k, v]).unsqueeze(0), layout.cp)  # keys of all ranks, one rank after the other
    k, v = pair.permute(1, 2, 3, 0, 4, 5).flatten(3, 4)
    if batch.real_BS is None:
        return _attend_to_row(q, k, v, Seen.ALL)
    held_S = torch.argsort(layout.order(q.device))
    mask = batch.real_BS[:1, None, None].index_select(3, held_S)
    return _attend_to_row(q, k, v, mask)

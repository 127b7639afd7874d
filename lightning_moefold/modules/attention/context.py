# SPDX-License-Identifier: Apache-2.0
"""Attention over rows that are cut over context parallel ranks (cp), and over long rows with masks on one rank.

A row of S positions (padded to a multiple of 2 * cp) is cut into 2 * cp chunks; rank i holds chunks i and 2 * cp - 1 - i
("zig-zag"), so that with a causal mask every rank has the same work. Three exchanges bring queries and keys together::

    ring         keys and values travel around the ranks, each step hidden behind the attention to what is there
    all_gather   keys and values of the whole row on every rank, in one collective
    all_to_all   whole rows with a part of the heads on every rank (Ulysses, arXiv 2309.14509)

Where one kernel computes rows with documents, padding or a window (:mod:`.varlen`), ``"auto"`` gathers keys where it would choose
a ring by size, because a ring would compute them in blocks.

Legend: B rows, H query heads, V key/value heads, S positions, L = S / cp positions of a rank, d head size, G = cp ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_moefold import comm
from lightning_moefold.errors import InputError
from lightning_moefold.mesh import Axis
from lightning_moefold.modules.attention.blockwise import Visibility
from lightning_moefold.modules.attention.exchanges import Exchange, exchange_for
from lightning_moefold.modules.attention.head_groups import AttentionByHeads
from lightning_moefold.modules.attention.layout import ContextLayout
from lightning_moefold.modules.attention.varlen import Runs, takes_runs


def find_runs_of(q_BHLd: Tensor, layout: ContextLayout, visibility: Visibility) -> Runs | None:
    """Returns the runs that one fused kernel computes (:mod:`.varlen`); None if blocks must, or need no mask."""
    if visibility.is_causal or not takes_runs(q_BHLd):
        return None
    return visibility.runs(q_BHLd.shape[0], layout.held_on_host, layout.cp.index, q_BHLd.device)


def choose_exchange(layout: ContextLayout, q: Tensor, k: Tensor) -> Exchange:
    """Returns the exchange that ``"auto"`` chooses for queries ``[B, H, L, d]`` and keys ``[B, V, L, d]``."""
    size = layout.cp.size
    return exchange_for(size, q.shape[1], k.shape[1], 2 * k.numel() * k.element_size() * size)


def context_attention(
    q_BHLd: Tensor, k_BVLd: Tensor, v_BVLd: Tensor, layout: ContextLayout, visibility: Visibility, exchange: Exchange
) -> Tensor:
    """Computes causal attention over whole rows, of which each rank holds its positions. Collective over cp.

    Args:
        q_BHLd: Queries of this rank's positions.
        k_BVLd: Keys of this rank's positions; V divides H.
        v_BVLd: Values of this rank's positions.
        layout: Layout of the row's positions over cp.
        visibility: Which keys a query sees, by positions in the row.
        exchange: Name of the exchange.

    Returns:
        ``[B, H, L, d]``.

    Raises:
        ValueError: If the exchange is ``"all_to_all"`` and cp does not divide the heads.
    """
    asked, size = exchange, layout.cp.size
    if size > 1 and asked == "auto":
        exchange = choose_exchange(layout, q_BHLd, k_BVLd)
    if size == 1 or exchange != "all_to_all":
        runs = None if size > 1 and asked == "ring" else find_runs_of(q_BHLd, layout, visibility)
        return AttentionByHeads.apply(q_BHLd, k_BVLd, v_BVLd, layout, visibility, exchange, runs)
    for name, heads in (("query", q_BHLd.shape[1]), ("key/value", k_BVLd.shape[1])):
        if heads % size:
            raise InputError(
                f"context_parallel_exchange='all_to_all' cuts heads over cp={size}, which does not divide the {heads} "
                f"{name} heads of a tp rank; use 'ring' or 'all_gather'."
            )
    whole = ContextLayout(layout.length)
    order = layout.order(q_BHLd.device)
    q, k, v = (_rows_of_some_heads(x, layout.cp, order) for x in (q_BHLd, k_BVLd, v_BVLd))
    y = AttentionByHeads.apply(q, k, v, whole, visibility, "ring", find_runs_of(q, whole, visibility))
    return _positions_of_all_heads(y, layout.cp, order)


def _rows_of_some_heads(x_BHLd: Tensor, cp: Axis, order: Tensor) -> Tensor:
    """Exchanges positions for heads, ``[B, H, L, d] -> [B, H / G, S, d]``, with positions in the order of the row."""
    rows, heads, length, size = x_BHLd.shape
    x_GBhLd = x_BHLd.view(rows, cp.size, heads // cp.size, length, size).transpose(0, 1)
    x_GBhLd = comm.all_to_all(x_GBhLd.contiguous(), [1] * cp.size, [1] * cp.size, cp)
    return x_GBhLd.permute(1, 2, 0, 3, 4).flatten(2, 3).index_select(2, order)


def _positions_of_all_heads(x_BhSd: Tensor, cp: Axis, order: Tensor) -> Tensor:
    """Inverts :func:`_rows_of_some_heads`, ``[B, H / G, S, d] -> [B, H, L, d]``."""
    x_BhGLd = x_BhSd.index_select(2, torch.argsort(order)).unflatten(2, (cp.size, -1))
    x_GBhLd = comm.all_to_all(x_BhGLd.permute(2, 0, 1, 3, 4).contiguous(), [1] * cp.size, [1] * cp.size, cp)
    return x_GBhLd.transpose(0, 1).flatten(1, 2)

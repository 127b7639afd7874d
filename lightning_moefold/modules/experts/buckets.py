# SPDX-License-Identifier: Apache-2.0
"""Experts of uneven widths as a few grouped products: experts of similar widths together, padded to the widest of them.

Padded channels are zero in all three projections, so they add nothing and have no gradient that anybody reads. A padded stack is
not kept for backward: it is made again from the flat one.

Legend: M rows in expert order, L local experts, D hidden size, w channels of the local experts, P channels with padding, X experts
that have channels, B experts of a bucket, F width of a bucket, b rows of a bucket.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_moefold.comm import linear
from lightning_moefold.dispatch import ExpertRows
from lightning_moefold.modules.experts.kernels import Activation, gated_experts

#: A bucket's narrowest expert has at least this share of the widest one's channels; so at most a quarter is padding.
NARROWEST = 0.75
#: Experts narrower than this share of the widest of all are one bucket: they are little work, however they are padded.
LITTLE = 0.125
#: Widths of buckets are multiples of it: rows of 16 bytes, which grouped products need.
MULTIPLE = 8


@dataclass(frozen=True)
class Buckets:
    """How experts of some widths are grouped.

    Args:
        experts: Experts of each bucket, the widest first; those without a channel are in none.
        widths: F of each bucket.
        place_w: Where each channel of the flat stack is among the P padded ones, int64.
        order_X: The experts of all buckets one after the other, int64.
    """

    experts: list[list[int]]
    widths: list[int]
    place_w: Tensor
    order_X: Tensor

    @property
    def channels(self) -> int:
        """P."""
        return sum(len(part) * width for part, width in zip(self.experts, self.widths, strict=True))

    def to(self, device: torch.device) -> Buckets:
        """With tensors on a device."""
        return replace(self, place_w=self.place_w.to(device), order_X=self.order_X.to(device))


def make_buckets(widths: Sequence[int]) -> Buckets:
    """Groups experts of similar widths."""
    order = sorted((e for e in range(len(widths)) if widths[e]), key=lambda e: -widths[e])
    experts: list[list[int]] = []
    for expert in order:
        head = widths[experts[-1][0]] if experts else 0
        if experts and (widths[expert] >= NARROWEST * head or head < LITTLE * widths[order[0]]):
            experts[-1].append(expert)
        else:
            experts.append([expert])
    tops = [-(-widths[part[0]] // MULTIPLE) * MULTIPLE for part in experts]
    starts, begin = {}, 0
    for part, top in zip(experts, tops, strict=True):
        for expert in part:
            starts[expert], begin = begin, begin + top
    places = [torch.arange(starts[e], starts[e] + width) for e, width in enumerate(widths) if width]
    none, order = torch.empty(0, dtype=torch.int64), [expert for part in experts for expert in part]
    return Buckets(experts, tops, torch.cat([none, *places]), torch.tensor(order, dtype=torch.int64))


def _padded(flat_wD: Tensor, buckets: Buckets) -> Tensor:
    """``[w, D] -> [P, D]`` with zeros between."""
    return flat_wD.new_zeros(buckets.channels, flat_wD.shape[1]).index_copy_(0, buckets.place_w, flat_wD)


class _Kept:
    """Keeps flat stacks for backward in place of the padded ones, which are made again once for all that reads them.

    Other tensors go where they would go without these hooks: to recomputation, which drops them, or to host memory.
    """

    def __init__(self, flat: Sequence[Tensor], padded: Sequence[Tensor], buckets: Buckets) -> None:
        # Private, but no public function tells which hooks these hide.
        self.others = torch._C._autograd._top_saved_tensors_default_hooks(True)
        self.flat, self.buckets = [stack.detach() for stack in flat], buckets
        self.numbers = {stack.untyped_storage().data_ptr(): number for number, stack in enumerate(padded)}
        self.again: dict[int, Tensor] = {}

    def pack(self, tensor: Tensor) -> Any:
        """Forgets the memory of a view of a padded stack."""
        number = self.numbers.get(tensor.untyped_storage().data_ptr())
        if number is None:
            return None, tensor if self.others is None else self.others[0](tensor)
        return number, torch.empty(0, dtype=tensor.dtype, device="meta").as_strided(
            tensor.shape, tensor.stride(), tensor.storage_offset()
        )

    def unpack(self, kept: tuple[int | None, Any]) -> Tensor:
        """Returns what was packed."""
        number, view = kept
        if number is None:
            return view if self.others is None else self.others[1](view)
        if number not in self.again:
            self.again[number] = _padded(self.flat[number], self.buckets)
        return self.again[number].as_strided(view.shape, view.stride(), view.storage_offset())


def in_buckets(
    x_MD: Tensor,
    weight_M: Tensor,
    counts: Sequence[int],
    counts_L: Tensor,
    stacks: Sequence[Tensor],
    buckets: Buckets,
    activation: Activation,
) -> Tensor:
    """Runs gated experts of uneven widths on their rows, ``[M, D] -> [M, D]``, one grouped product for each bucket.

    Args:
        x_MD: Token of each row.
        weight_M: Router weight of each row.
        counts: Rows of each expert.
        counts_L: The same on the device.
        stacks: Gate, up and down, ``[w, D]`` each.
        buckets: Of these experts, on the device.
        activation: Of the gate.
    """
    pad, unpad = partial(_padded, buckets=buckets), partial(torch.index_select, dim=0, index=buckets.place_w)
    padded = [linear(stack_wD, pad, unpad) for stack_wD in stacks]
    kept = _Kept(stacks, padded, buckets)
    x_parts, weight_parts = x_MD.split(list(counts)), weight_M.split(list(counts))
    y_parts: list[Tensor] = [part.new_zeros(part.shape) for part in x_parts]  # of experts without a channel
    counts_X = counts_L.index_select(0, buckets.order_X).split([len(part) for part in buckets.experts])
    start = 0
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack):
        for experts, width, counts_B in zip(buckets.experts, buckets.widths, counts_X, strict=True):
            end, own = start + len(experts) * width, [counts[e] for e in experts]
            gate, up, down = (stack_PD[start:end].view(len(experts), width, -1) for stack_PD in padded)
            weight_b = torch.cat([weight_parts[e] for e in experts])
            rows = ExpertRows(None, weight_b, counts_B, distinct=True, counts=own)
            x_bD = torch.cat([x_parts[e] for e in experts])
            y_bD = gated_experts(x_bD, rows, activation, gate, up, down.transpose(1, 2), "grouped_mm")
            for expert, y_cD in zip(experts, y_bD.split(own), strict=True):
                y_parts[expert] = y_cD.to(x_MD.dtype)
            start = end
    return torch.cat(y_parts)

# SPDX-License-Identifier: Apache-2.0
"""Products of all rows with their experts' matrices, on CUDA: one grouped kernel, or cuBLAS once for each expert.

The grouped kernel needs nothing from the host. cuBLAS needs to know how many rows each expert has, and adds a second product
to a first without a pass of its own; whether it is faster where experts have many rows, ``make gpu`` measures.

Legend: M rows in expert order, L local experts, I and O widths in and out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_moefold.dispatch import ExpertRows
from lightning_moefold.modules.experts.stack import gradient_like
from lightning_moefold.modules.quantized import CodedStack

_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Products(ABC):
    """Products with stacks ``[L, O, I]``: each row with the matrix of its expert."""

    @abstractmethod
    def forward(self, x_MI: Tensor, w_LOI: Tensor) -> Tensor:
        """``y = x w^T``, ``[M, I] -> [M, O]``."""

    @abstractmethod
    def input_gradient(self, grad_MO: Tensor, w_LOI: Tensor, total_MI: Tensor | None = None) -> Tensor:
        """``grad w``, ``[M, O] -> [M, I]``; added to ``total_MI``, in its place, where that is given."""

    @abstractmethod
    def weight_gradient(self, grad_MO: Tensor, x_MI: Tensor, w_LOI: Tensor) -> Tensor:
        """``grad^T x`` of each expert, ``[L, O, I]``; zero for experts without rows."""


class GroupedProducts(Products):
    """By ``torch.nn.functional.grouped_mm``.

    Args:
        counts_L: Rows of each expert, on the device.
    """

    def __init__(self, counts_L: Tensor) -> None:
        self.ends_L = counts_L.cumsum(0).to(torch.int32)

    def forward(self, x_MI: Tensor, w_LOI: Tensor) -> Tensor:
        """See :meth:`Products.forward`."""
        return F.grouped_mm(x_MI, w_LOI.transpose(1, 2), offs=self.ends_L)

    def input_gradient(self, grad_MO: Tensor, w_LOI: Tensor, total_MI: Tensor | None = None) -> Tensor:
        """See :meth:`Products.input_gradient`."""
        product_MI = F.grouped_mm(grad_MO, w_LOI, offs=self.ends_L)
        return product_MI if total_MI is None else total_MI.add_(product_MI)

    def weight_gradient(self, grad_MO: Tensor, x_MI: Tensor, w_LOI: Tensor) -> Tensor:
        """See :meth:`Products.weight_gradient`."""
        return F.grouped_mm(grad_MO.t(), x_MI, offs=self.ends_L)


class ExpertProducts(Products):
    """By ``torch.mm``, one expert after the other.

    Args:
        counts: Rows of each expert, on the host.
    """

    def __init__(self, counts: list[int]) -> None:
        self.counts = counts

    def _blocks(self) -> list[tuple[int, slice]]:
        blocks, start = [], 0
        for expert, count in enumerate(self.counts):
            if count:
                blocks.append((expert, slice(start, start + count)))
            start += count
        return blocks

    def forward(self, x_MI: Tensor, w_LOI: Tensor) -> Tensor:
        """See :meth:`Products.forward`."""
        y_MO = x_MI.new_empty(x_MI.shape[0], w_LOI.shape[1])
        for expert, rows in self._blocks():
            torch.mm(x_MI[rows], w_LOI[expert].t(), out=y_MO[rows])
        return y_MO

    def input_gradient(self, grad_MO: Tensor, w_LOI: Tensor, total_MI: Tensor | None = None) -> Tensor:
        """See :meth:`Products.input_gradient`."""
        fresh = total_MI is None
        total = grad_MO.new_empty(grad_MO.shape[0], w_LOI.shape[2]) if total_MI is None else total_MI
        for expert, rows in self._blocks():
            total[rows].addmm_(grad_MO[rows], w_LOI[expert], beta=0 if fresh else 1)
        return total

    def weight_gradient(self, grad_MO: Tensor, x_MI: Tensor, w_LOI: Tensor) -> Tensor:
        """See :meth:`Products.weight_gradient`."""
        grad_LOI, blocks = gradient_like(w_LOI), self._blocks()
        for expert in set(range(len(self.counts))) - {expert for expert, _ in blocks}:
            grad_LOI[expert].zero_()
        for expert, rows in blocks:
            torch.mm(grad_MO[rows].t(), x_MI[rows], out=grad_LOI[expert])
        return grad_LOI


def choose_products(
    x_AI: Tensor, rows: ExpertRows, stacks: Sequence[Tensor | CodedStack], kernel: Literal["auto", "loop", "grouped_mm"]
) -> Products | None:
    """How the products of these rows are made; None for the way of the CPU, which makes all steps of an expert together.

    Args:
        x_AI: Tokens.
        rows: Which token each row reads.
        stacks: Of the experts, one of each shape.
        kernel: As the user chose. ``"auto"`` on CUDA is the grouped kernel where it does not wait for the device (bfloat16,
            Hopper and newer), else cuBLAS.
    """
    on_cuda, count = x_AI.is_cuda, rows.weight_M.shape[0]
    grouped = kernel == "grouped_mm" or (kernel == "auto" and on_cuda and grouped_never_waits(x_AI.dtype, x_AI.device))
    if grouped and count and all(_grouped_takes(x_AI, stack_LOI) for stack_LOI in stacks):
        return GroupedProducts(rows.counts_L)
    return ExpertProducts(host_counts(rows)) if on_cuda and count else None


def host_counts(rows: ExpertRows) -> list[int]:
    """Rows of each expert; waits for the device where the host does not know them."""
    return rows.counts_L.tolist() if rows.counts is None else rows.counts


def _grouped_takes(x_AI: Tensor, w_LOI: Tensor | CodedStack) -> bool:
    """It has no float64, and rows of all operands must be multiples of 16 bytes."""
    aligned = all(n * x_AI.element_size() % 16 == 0 for n in w_LOI.shape[1:])
    return x_AI.dtype in _GROUPED_DTYPES and aligned


def grouped_never_waits(dtype: torch.dtype, device: torch.device) -> bool:
    """Elsewhere the grouped product is a loop inside PyTorch, which reads the counts from the device at every call."""
    return dtype == torch.bfloat16 and torch.cuda.get_device_capability(device)[0] >= 9

# SPDX-License-Identifier: Apache-2.0
"""Experts' products in FP8 with PyTorch's own kernel, ``torch._scaled_grouped_mm``; no other library is needed.

Forward and the gradient of the tokens multiply in FP8 (E4M3): each token, and each output of an expert's matrix, has a scale
of its own, a power of two, made anew from the values at hand. The gradient of the weights stays in the dtype of the tokens,
because its sums run over tokens, whose scales differ. Recipes that do the same are called "rowwise with gradient of the
weights in high precision" elsewhere.

On CPU the same numbers are rounded to FP8 and multiplied in float32: for tests, and slow.

Legend: M rows in expert order, L local experts, I and O widths in and out.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_moefold.errors import InputError
from lightning_moefold.modules.experts.products import GroupedProducts

#: Widths must be multiples of this many numbers: 16 bytes, as the kernel reads them.
MULTIPLE = 16
_FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_FP8).max


def to_float8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers in E4M3 and a scale for each row, so that ``number * scale`` is ``x`` rounded; ``[..., N]`` and ``[...]``.

    A scale is the smallest power of two with which a row's largest value stays below the largest of E4M3, 448. ``x`` is read
    twice and never copied to float32: the norm is exact in any dtype, and the division, in float32, writes E4M3.
    """
    share = torch.linalg.vector_norm(x, float("inf"), -1).float() / _LARGEST
    scale = torch.ldexp(torch.ones_like(share), torch.frexp(share).exponent)
    number = torch.empty(x.shape, dtype=_FP8, device=x.device)  # contiguous, whatever x is
    return torch.div(x, scale.unsqueeze(-1), out=number), scale


class Float8Products(GroupedProducts):
    """Products in FP8; the gradient of the weights as in :class:`.GroupedProducts`."""

    def forward(self, x_MI: Tensor, w_LOI: Tensor) -> Tensor:
        """See :meth:`.Products.forward`."""
        return self._multiply(x_MI, w_LOI)

    def input_gradient(self, grad_MO: Tensor, w_LOI: Tensor, total_MI: Tensor | None = None) -> Tensor:
        """See :meth:`.Products.input_gradient`."""
        product_MI = self._multiply(grad_MO, w_LOI.transpose(1, 2))
        return product_MI if total_MI is None else total_MI.add_(product_MI)

    def _multiply(self, x_MI: Tensor, w_LOI: Tensor) -> Tensor:
        """``x w^T`` with both rounded along the axis over which products are summed."""
        (x, scale_M), (w, scale_LO) = to_float8(x_MI), to_float8(w_LOI)
        if x_MI.is_cuda:
            return _scaled_product(x, w, scale_M, scale_LO, self.ends_L).to(x_MI.dtype)
        rounded_MI, rounded_LOI = x.float() * scale_M.unsqueeze(-1), w.float() * scale_LO.unsqueeze(-1)
        return F.grouped_mm(rounded_MI, rounded_LOI.transpose(1, 2), offs=self.ends_L).to(x_MI.dtype)


def _scaled_product(x_MI: Tensor, w_LOI: Tensor, scale_M: Tensor, scale_LO: Tensor, ends_L: Tensor) -> Tensor:
    """The product of two factors of 8 bits with their scales, in bfloat16."""
    return torch._scaled_grouped_mm(
        x_MI, w_LOI.transpose(1, 2), scale_M, scale_LO, offs=ends_L, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def check_float8(widths: dict[str, int], dtype: torch.dtype, device: torch.device) -> None:
    """Checks what FP8 asks for, before anything is computed.

    Args:
        widths: Sizes on this rank that products are summed over or give, by name.
        dtype: Of the computation.
        device: Of the computation.

    Raises:
        ValueError: For widths that are no multiples of 16, for float64, and for a device without FP8.
    """
    for name, width in widths.items():
        if width % MULTIPLE:
            raise InputError(
                f"expert_kernel='fp8' needs widths that are multiples of {MULTIPLE}, and {name} is {width} on a rank; use "
                "'auto', or a fold that cuts it less."
            )
    if dtype == torch.float64:
        raise InputError("expert_kernel='fp8' rounds to 8 bits, which float64 is not asked for; use 'auto'.")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        raise InputError(
            "expert_kernel='fp8' needs a GPU of compute capability 9.0 (Hopper) or newer, and "
            f"{torch.cuda.get_device_name(device)} has {'.'.join(map(str, torch.cuda.get_device_capability(device)))}; use 'auto'."
        )

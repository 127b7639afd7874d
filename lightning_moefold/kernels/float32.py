# SPDX-License-Identifier: Apache-2.0
"""Matrix products in true float32, whatever precision the process allows elsewhere.

``torch.set_float32_matmul_precision("high")``, which Lightning recommends, makes CUDA round the factors of float32
products to TF32, which has 10 bits. A router must not use it, because experts with nearly equal scores would change
places.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def exact_linear(x_ND: Tensor, weight_ED: Tensor) -> Tensor:
    """Computes ``x weight^T`` without TF32, ``[N, D] -> [N, E]``; both are float32 or wider, and of the same dtype."""
    if x_ND.is_cuda and (torch.compiler.is_compiling() or _rounds()):
        return _product(x_ND, weight_ED.t())
    return x_ND @ weight_ED.t()


@torch.library.custom_op("moefold::exact_product", mutates_args=())
def _product(a: Tensor, b: Tensor) -> Tensor:
    with _without_rounding():
        return a @ b


@_product.register_fake
def _shape_of_product(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    a, b = ctx.saved_tensors
    need_a, need_b = ctx.needs_input_grad
    return _product(grad, b.t()) if need_a else None, _product(a.t(), grad) if need_b else None


_product.register_autograd(_gradients, setup_context=_keep)


def _rounds() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


@contextmanager
def _without_rounding() -> Iterator[None]:
    """Turns TF32 off in the context, by whichever of PyTorch's two settings the user has used."""
    if not _rounds():
        yield
        return
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # the user used the newer setting, so the older one cannot be read
        before = "highest"
    if before == "highest":
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    else:
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if before == "highest":
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        else:
            torch.set_float32_matmul_precision(before)

# SPDX-License-Identifier: Apache-2.0
"""Frozen weights in fewer bytes: 4 bits a number (NF4, arXiv 2305.14314) by bitsandbytes, or 8 (int8).

Each row of a weight is cut into blocks of 64 numbers along its inputs. A block is stored as codes and the largest of its
magnitudes in float32. No block has numbers of two rows, so that a cut between rows, or at a multiple of 64 inputs, is a cut
between blocks: ranks store slices of what one process stores, and compute with the same numbers under every fold.

A weight is decoded for a product in forward, and again in backward; between them only the codes exist.

Legend: L experts, O outputs, I inputs, X bytes, N tokens, B blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_moefold.arguments import check_choice
from lightning_moefold.errors import InputError
from lightning_moefold.modules.quantization import BITS, BLOCK, QUANTIZATIONS, Quantization


@dataclass(frozen=True)
class Codec:
    """Turns weights into bytes and back.

    Args:
        kind: ``"nf4"`` or ``"int8"``.
        dtype: The dtype that the weights would have without it.

    Raises:
        InputError: If the kind is unknown, or its library is not installed.
    """

    kind: Quantization
    dtype: torch.dtype

    def __post_init__(self) -> None:
        check_choice("quantize", self.kind, QUANTIZATIONS)
        if self.kind == "nf4" and find_spec("bitsandbytes") is None:
            raise InputError(
                "quantize='nf4' needs bitsandbytes, which is not installed; run pip install 'lightning-moefold[quantized]', or "
                "use quantize='int8'."
            )

    def room(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Returns bytes without values for a weight ``[O, I]``, ``[X]``, or for a stack ``[L, O, I]``, ``[L, X]``."""
        bytes_of_one = prod(shape[-2:]) * int(BITS[self.kind] * 2) // 16
        return torch.empty(*shape[:-2], bytes_of_one, dtype=torch.uint8, device=device)

    @torch.no_grad()
    def encode(self, weight_OI: Tensor) -> Tensor:
        """Rounds a weight, ``[X]``: first all codes, then the scales of the blocks. I is a multiple of 64."""
        weight = weight_OI.to(torch.float32).contiguous()
        if self.kind == "nf4":
            from bitsandbytes.functional import quantize_4bit

            codes, state = quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4", compress_statistics=False)
            return torch.cat([codes.view(-1), state.absmax.view(torch.uint8)])
        blocks_B = weight.view(-1, BLOCK)
        scale_B = blocks_B.abs().amax(1) / 127
        codes_B = (blocks_B / scale_B.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)).round_().to(torch.int8)
        return torch.cat([codes_B.view(-1).view(torch.uint8), scale_B.view(torch.uint8)])

    @torch.no_grad()
    def decode(self, bytes_X: Tensor, shape: tuple[int, ...], dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Returns the rounded weight, ``[O, I]``: products in float32, rounded to ``dtype``; in ``out``, where that is given."""
        number = prod(shape)
        codes, scale_B = bytes_X[: -number // BLOCK * 4], bytes_X[-number // BLOCK * 4 :].view(torch.float32)
        if self.kind == "int8":
            weight = torch.empty(shape, dtype=dtype, device=bytes_X.device) if out is None else out
            torch.mul(codes.view(torch.int8).view(-1, BLOCK), scale_B.unsqueeze(1), out=weight.view(-1, BLOCK))
            return weight
        from bitsandbytes.functional import QuantState, dequantize_4bit

        there = torch.float32 if dtype == torch.float64 else dtype  # which the library does not have
        state = QuantState(scale_B, torch.Size(shape), blocksize=BLOCK, quant_type="nf4", dtype=there)
        # Elsewhere the library decodes into no tensor of ours.
        if out is not None and out.is_cuda and out.dtype == there:
            return dequantize_4bit(codes.unsqueeze(1), state, out=out)
        weight = dequantize_4bit(codes.unsqueeze(1), state)
        return weight.to(dtype) if out is None else out.copy_(weight)


class CodedStack:
    """The matrices of some experts as bytes, where kernels take a stack ``[L, O, I]``; ``shape`` is that of one."""

    def __init__(self, bytes_LX: Tensor, shape: tuple[int, ...], codec: Codec, dtype: torch.dtype) -> None:
        self.bytes_LX, self.codec, self.dtype = bytes_LX, codec, dtype
        self.shape = (bytes_LX.shape[0], *shape)

    def __getitem__(self, expert: int) -> Tensor:
        """The matrix of an expert, ``[O, I]``."""
        return self.codec.decode(self.bytes_LX[expert], self.shape[1:], self.dtype)

    def whole(self) -> Tensor:
        """All matrices, ``[L, O, I]``."""
        out_LOI = torch.empty(self.shape, dtype=self.dtype, device=self.bytes_LX.device)
        for bytes_X, out_OI in zip(self.bytes_LX, out_LOI, strict=True):
            self.codec.decode(bytes_X, self.shape[1:], self.dtype, out_OI)
        return out_LOI


def decoded(stack: Tensor | CodedStack) -> Tensor:
    """Returns a stack as numbers."""
    return stack.whole() if isinstance(stack, CodedStack) else stack


class _Product(torch.autograd.Function):
    """``x W^T + b`` with a weight that is decoded again for backward, instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight: Callable[[torch.dtype], Tensor], bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(x_NI, weight(x_NI.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor | None]:
        [grad_NO] = grads
        grad_bias = grad_NO.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return grad_NO @ ctx.weight(grad_NO.dtype), None, grad_bias


def product(x_NI: Tensor, weight: Callable[[torch.dtype], Tensor], bias: Tensor | None = None) -> Tensor:
    """Returns ``x W^T + b``; ``weight`` returns W ``[O, I]`` in a dtype, and is called again in backward."""
    return _Product.apply(x_NI, weight, bias)


# ---- modules ---------------------------------------------------------------------------------------------------------


class CodedModule(nn.Module):
    """A module some of whose weights may be stored as bytes, as buffers under their names that no checkpoint holds.

    Attributes:
        codec: Of the bytes; None while all weights are numbers.
        coded: Shape of each such weight on this rank, by name.
    """

    codec: Codec | None = None
    coded: dict[str, tuple[int, ...]]

    def quantize(self, codec: Codec, names: Sequence[str]) -> None:
        """Replaces weights that have no values yet by bytes without values."""
        self.codec, self.coded = codec, {}
        for name in names:
            weight = self.get_parameter(name)
            delattr(self, name)
            self.register_buffer(name, None, persistent=False)
            self.cut_coded(name, tuple(weight.shape), weight.device)

    def cut_coded(self, name: str, shape: tuple[int, ...], device: torch.device | None = None) -> None:
        """Makes room for another part of a weight, without values."""
        assert self.codec is not None
        self.coded[name] = shape
        setattr(self, name, self.codec.room(shape, device or self.get_buffer(name).device))

    def decode(self, name: str, dtype: torch.dtype) -> Tensor:
        """Returns the part ``[O, I]`` of a weight on this rank."""
        assert self.codec is not None
        return self.codec.decode(self.get_buffer(name), self.coded[name], dtype)


def coded_weights(root: nn.Module) -> Iterator[tuple[str, CodedModule, str]]:
    """Yields each weight that is stored as bytes: its name, its module, and its name there."""
    for prefix, module in root.named_modules():
        if isinstance(module, CodedModule) and module.codec is not None:
            for leaf in module.coded:
                yield f"{prefix}.{leaf}".lstrip("."), module, leaf

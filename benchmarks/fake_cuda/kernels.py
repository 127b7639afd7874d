# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for kernels of a CUDA build, where a CPU build would compose an operation from many.

Import after :func:`fake_cuda.load` and before ``lightning_moefold``, then call :func:`use_triton`.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_ATEN: Any = torch.ops.aten
_LIBRARY = torch.library.Library("on_cuda", "DEF")


def _define(schema: str, shape: Any) -> Any:
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    torch.library.impl(_LIBRARY, name, "Meta")(shape)
    torch.library.register_fake(f"on_cuda::{name}")(shape)
    return getattr(torch.ops.on_cuda, name)


_silu_backward = _define("silu_backward(Tensor g, Tensor x) -> Tensor", lambda g, x: torch.empty_like(g))
_norm = _define(
    "rms_norm(Tensor x, Tensor w) -> (Tensor, Tensor)",
    lambda x, w: (torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)),
)
_norm_backward = _define(
    "rms_norm_backward(Tensor g, Tensor x, Tensor scale, Tensor w) -> (Tensor, Tensor)",
    lambda g, x, scale, w: (torch.empty_like(x), torch.empty_like(w)),
)
_efficient = _define(
    "efficient_attention(Tensor q, Tensor k, Tensor v, Tensor? mask) -> (Tensor, Tensor)",
    lambda q, k, v, mask: (torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)),
)
_efficient_backward = _define(
    "efficient_attention_backward(Tensor g, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, Tensor lse)"
    " -> (Tensor, Tensor, Tensor)",
    lambda g, q, k, v, mask, out, lse: (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)),
)
_launch = _define("triton_launch(Tensor[] tensors) -> Tensor", lambda tensors: tensors[0].new_empty(0))


class _Silu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _ATEN.silu(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _silu_backward(grads[0], *ctx.saved_tensors)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        y, scale = _norm(x, weight)
        ctx.save_for_backward(x, scale, weight)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return _norm_backward(grads[0], *ctx.saved_tensors)


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        out, lse = _ATEN._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[:2]
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.causal = causal
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        state = torch.empty(2, dtype=torch.uint64, device=q.device)
        through = _ATEN._scaled_dot_product_flash_attention_backward(
            grads[0], q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, ctx.causal, state, state[0]
        )
        return *through, None


class _MaskedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out, lse = _efficient(q, k, v, mask)
        ctx.save_for_backward(q, k, v, mask, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *_efficient_backward(grads[0], *ctx.saved_tensors), None


def _attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """What dispatch chooses on CUDA: the flash kernel for 16 bits without a mask, otherwise the memory-efficient one."""
    if dropout_p or scale is not None:
        raise NotImplementedError("dropout and scales have no stand-in.")
    if q.shape[1] != k.shape[1] and not enable_gqa:
        raise ValueError("grouped heads need enable_gqa.")
    if attn_mask is None and q.dtype in (torch.bfloat16, torch.float16):
        return _Flash.apply(q, k, v, is_causal)
    if enable_gqa or q.dtype == torch.float64:
        raise NotImplementedError("the memory-efficient kernel takes neither grouped heads nor float64.")
    return _MaskedAttention.apply(q, k, v, attn_mask)


torch.cuda.get_device_capability = lambda device=None: (9, 0)  # an H100
_ATEN.silu_backward = _silu_backward
_FUNCTIONS: Any = F
_FUNCTIONS.silu = lambda x, inplace=False: _Silu.apply(x)
_FUNCTIONS.rms_norm = lambda x, shape, weight=None, eps=None: _RMSNorm.apply(x, weight)
_FUNCTIONS.scaled_dot_product_attention = _attention


# ---- Triton ----------------------------------------------------------------------------------------------------------


class _Kernel:
    """Launched, it says which tensors it was given; each is taken to be read or written once."""

    def __init__(self, function: Any) -> None:
        self.__wrapped__ = function

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            _launch([arg for arg in (*args, *options.values()) if isinstance(arg, Tensor)])

        return launch


class _Anything(ModuleType):
    def __getattr__(self, name: str) -> Any:
        return object()


def use_triton() -> None:
    """Has the package's Triton kernels launched on fake tensors, as they would be on real ones of a CUDA build."""
    try:
        kernels = importlib.import_module("lightning_moefold.kernels")
    except ModuleNotFoundError:
        return
    triton: Any = ModuleType("triton")
    triton.language = _Anything("triton.language")
    triton.language.constexpr = int
    triton.jit, triton.cdiv = _Kernel, lambda a, b: -(-a // b)
    triton.next_power_of_2 = lambda n: 1 << (n - 1).bit_length()
    names = ("triton", "triton.language")
    before = {name: sys.modules.pop(name, None) for name in names}
    sys.modules |= {"triton": triton, "triton.language": triton.language}
    try:
        for module in pkgutil.iter_modules(kernels.__path__):
            importlib.import_module(f"lightning_moefold.kernels.{module.name}")
    finally:
        for name, real in before.items():
            del sys.modules[name]
            if real is not None:
                sys.modules[name] = real
    for name, loaded in list(sys.modules.items()):
        if name.startswith("lightning_moefold.") and hasattr(loaded, "runs_triton"):
            vars(loaded)["runs_triton"] = _on_cuda


def _on_cuda(*tensors: Tensor) -> bool:
    return all(tensor.is_cuda and tensor.dtype != torch.float64 for tensor in tensors)

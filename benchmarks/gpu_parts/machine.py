# SPDX-License-Identifier: Apache-2.0
"""What the machine is, and the two ceilings: copies and matrix products."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from functools import partial
from typing import Any

import torch

from gpu_parts.clock import median_ms
from gpu_parts.record import Context

_PACKAGES = ("torch", "lightning", "transformers", "triton", "peft", "jsonargparse", "wandb", "transformer_engine", "torchao",
             "liger_kernel")  # fmt: skip


def run(ctx: Context) -> None:
    """The part."""
    ctx.record.attempt("versions", "versions", lambda: _versions(ctx))
    ctx.record.attempt("ceilings", "copy, bytes read and written", lambda: _copy(ctx))
    for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.float32, "float32")):
        ctx.record.attempt("ceilings", f"square product, {name}", partial(_product, ctx, dtype))


def _versions(ctx: Context) -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "-"
    found["c compiler"] = shutil.which("gcc") or shutil.which("cc") or "-"
    if ctx.on_gpu:
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "memory_gb": properties.total_memory / 1e9, "cuda": torch.version.cuda}
        found["cudnn"] = torch.backends.cudnn.version()
    return found


def _copy(ctx: Context) -> dict[str, Any]:
    a = torch.randn(ctx.pick(1 << 30, 1 << 12), device=ctx.device)
    b = torch.empty_like(a)
    ms = median_ms(ctx, lambda: b.copy_(a))
    return {"ms": ms, "GB/s": 2 * a.nbytes / ms / 1e6}


def _product(ctx: Context, dtype: torch.dtype) -> dict[str, Any]:
    edge = ctx.pick(8192, 64)
    a, b = (torch.randn(edge, edge, device=ctx.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    ms = median_ms(ctx, lambda: torch.mm(a, b, out=out))
    return {"ms": ms, "TFLOP/s": 2 * edge**3 / ms / 1e9}

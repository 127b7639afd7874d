# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402 (the device must be there before torch is imported)
"""Runs on fake CUDA tensors what :mod:`.test_cuda_on_cpu` asks about, in a process of its own; prints JSON."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import fake_cuda

fake_cuda.load()

import cuda_bytes
import torch
from fake_cuda import kernels
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_moefold.modules.attention import blockwise
from tests.cuda_on_cpu import models, products


def budget() -> dict[str, Any]:
    return {
        name: {
            **cuda_bytes.figures(counter := cuda_bytes.count(layer))._asdict(),
            "reads": counter.reads,
            "moved": counter.copies,
        }
        for name, layer in cuda_bytes.SLICES.items()
    }


def flash() -> dict[str, Any]:
    """The calls of blocks without a mask, with grouped heads."""
    with FakeTensorMode():
        q = torch.empty(2, 8, 32, 64, dtype=torch.bfloat16, device="cuda")
        k, v = (torch.empty(2, 2, 48, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        out, lse = blockwise.block_forward(q, k, v, blockwise.Seen.ALL)
        grads = blockwise.block_backward(torch.empty_like(out), q, k, v, out, lse, blockwise.Seen.ALL)
        tensors = {"out": out, "lse": lse, **dict(zip(("q", "k", "v"), grads, strict=True))}
    return {name: [list(x.shape), str(x.dtype), str(x.device)] for name, x in tensors.items()}


PARTS: dict[str, Callable[[], Any]] = {"budget": budget, "products": products.check, "flash": flash}
PARTS |= {f"model: {name}": lambda run=run: models.train(run) for name, run in models.RUNS.items()}


def main() -> None:
    kernels.use_triton()
    found: dict[str, Any] = {}
    for name in sys.argv[1:] or PARTS:
        start = time.perf_counter()
        try:
            found[name] = {"found": PARTS[name]()}
        except Exception:
            found[name] = {"error": traceback.format_exc()}
        found[name]["seconds"] = time.perf_counter() - start
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)

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
from unittest import mock

import fake_cuda

fake_cuda.load()

import cuda_bytes
import torch
import torch.distributed as dist
from fake_cuda import kernels
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_moefold.mesh import Axis
from lightning_moefold.modules import Attention, DecoderLayer, MoELayer
from lightning_moefold.modules.attention import blockwise
from lightning_moefold.modules.attention.blockwise import Visibility
from lightning_moefold.modules.attention.context import context_attention
from lightning_moefold.modules.attention.layout import ContextLayout
from lightning_moefold.modules.attention.varlen import Runs
from lightning_moefold.modules.base import Linear
from lightning_moefold.modules.routers import RouterOptions
from tests.cuda_on_cpu import deterministic, models, products


def budget() -> dict[str, Any]:
    return {
        name: {
            **cuda_bytes.figures(counter := cuda_bytes.count(layer))._asdict(),
            "reads": counter.reads,
            "moved": counter.copies,
        }
        for name, layer in {**cuda_bytes.SLICES, **cuda_bytes.FLOAT8}.items()
    }


def noise() -> dict[str, Any]:
    """A step of a layer whose router has jitter and whose linear layers drop inputs of adapters."""
    counter = cuda_bytes.Counter(64)
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device("cuda"):
                moe = MoELayer(256, 8, 2, 128, router=RouterOptions(input_jitter=0.1), shared_ffn_hidden_size=128)
                layer = DecoderLayer(256, Attention(256, 8, 4), moe)
                for key, part in enumerate(m for m in layer.modules() if isinstance(m, Linear)):
                    part.adapt(4, 1.0, dropout=0.1, key=key << 50)
        finally:
            torch.set_default_dtype(torch.float32)
        x_BSD = torch.empty(4, 64, 256, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        with counter, deterministic.Refusals() as refusals:
            layer(x_BSD).sum().backward()
    return {"reads": counter.reads, "moved": counter.copies, "refused": refusals.found}


def flash() -> dict[str, Any]:
    """The calls of blocks without a mask, with grouped heads."""
    with FakeTensorMode():
        q = torch.empty(2, 8, 32, 64, dtype=torch.bfloat16, device="cuda")
        k, v = (torch.empty(2, 2, 48, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        out, lse = blockwise.block_forward(q, k, v, blockwise.Seen.ALL)
        grads = blockwise.block_backward(torch.empty_like(out), q, k, v, out, lse, blockwise.Seen.ALL)
        tensors = {"out": out, "lse": lse, **dict(zip(("q", "k", "v"), grads, strict=True))}
    return {name: [list(x.shape), str(x.dtype), str(x.device)] for name, x in tensors.items()}


def runs() -> dict[str, Any]:
    """Two packed rows with a window over four ranks: one kernel for all, whose runs were found on the host."""
    dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    try:
        layout = ContextLayout(1024, Axis("cp", (0, 1, 2, 3), 1, dist.group.WORLD))
        visibility = Visibility(100, (torch.arange(1024) // 300).expand(2, -1))
        found = visibility.runs(2, layout.held(), 1, torch.device("cpu"))
        with FakeTensorMode(allow_non_fake_inputs=True):
            on_device = [x.to("cuda") if isinstance(x, torch.Tensor) else x for x in found or ()]
            visibility._runs = dict.fromkeys(visibility._runs, Runs(*on_device))
            inputs = [
                torch.empty(2, 256, heads, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
                for heads in (8, 2, 2)
            ]
            stream = mock.patch.object(torch.cuda, "current_stream", return_value=None)
            with cuda_bytes.Counter() as counter, stream:
                out = context_attention(*(x.transpose(1, 2) for x in inputs), layout, visibility, "auto")
                grads = torch.autograd.grad(out.sum(), inputs)
    finally:
        dist.destroy_process_group()
    tensors = {"out": out, **dict(zip(("q", "k", "v"), grads, strict=True))}
    shapes = {name: [list(x.shape), str(x.dtype), str(x.device)] for name, x in tensors.items()}
    kernels_called = [op.name for op in counter.operations if "flash" in op.name]
    return {**shapes, "masks": len(visibility._masks), "reads": counter.reads, "kernels": kernels_called}


PARTS: dict[str, Callable[[], Any]] = {
    "budget": budget, "noise": noise, "products": products.check, "flash": flash, "runs": runs,
    "sampling": deterministic.sampling,
}  # fmt: skip
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

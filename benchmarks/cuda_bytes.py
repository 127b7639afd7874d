# SPDX-License-Identifier: Apache-2.0

"""What a decoder layer moves through the memory of a GPU, counted without one, and the MFU that this allows at most.

    python benchmarks/cuda_bytes.py [--tokens 8192] [--top 12] [--json FILE]

Forward and backward of a layer run on fake CUDA tensors in bfloat16 (:mod:`fake_cuda`); every operation is written
down with the bytes that it has to read and write. A step is the sum of what each operation takes at the rates below: products
at 0.78 of the peak (of twice the peak in FP8) or by bandwidth, flash attention at its own rates, everything else by bandwidth.
Launches and gaps between kernels are left out, so the MFU is a bound from above, and two states of the code can be compared by it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import fake_cuda

if __name__ == "__main__":
    fake_cuda.load()

import torch
from fake_cuda import kernels
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_moefold.modules import Attention, DecoderLayer, Experts, MoELayer
from lightning_moefold.modules.experts.kernels import ExpertKernel
from lightning_moefold.modules.routers import RouterOptions

# One H100 SXM: peak in bfloat16, share of it that large products reach, float32 products, memory, flash forward and backward.
PEAK, PRODUCTS, FLOAT32, BANDWIDTH = 989.4e12, 0.78, 40e12, 2.85e12
FLASH = {"forward": 0.56, "backward": 0.49}
#: The shortest kernel, in seconds.
SHORTEST = 2e-6


@dataclass(frozen=True)
class Slice:
    """A decoder layer of a published model."""

    hidden: int
    heads: int
    kv_heads: int
    experts: int
    top_k: int
    width: int
    shared: int = 0
    qkv_bias: bool = False
    norm_topk: bool = True
    kernel: ExpertKernel = "auto"

    def make(self) -> DecoderLayer:
        attention = Attention(self.hidden, self.heads, self.kv_heads, 128, qkv_bias=self.qkv_bias)
        router = RouterOptions(norm_topk_prob=self.norm_topk)
        moe = MoELayer(
            self.hidden, self.experts, self.top_k, self.width, router=router, shared_ffn_hidden_size=self.shared
        )
        assert isinstance(moe.experts, Experts)
        moe.experts.kernel = self.kernel
        return DecoderLayer(self.hidden, attention, moe)


SLICES = {
    "Mixtral-8x22B": Slice(6144, 48, 8, 8, 2, 16384),
    "Qwen2-57B-A14B": Slice(3584, 28, 4, 64, 8, 2560, 20480, qkv_bias=True, norm_topk=False),
}
#: The same with ``expert_kernel="fp8"``.
FLOAT8 = {f"{name}, experts in FP8": replace(layer, kernel="fp8") for name, layer in SLICES.items()}


class Operation(NamedTuple):
    """One kernel."""

    phase: str
    name: str
    kind: str
    bytes: int
    flops: float

    @property
    def seconds(self) -> float:
        by_bytes = self.bytes / BANDWIDTH
        if self.kind == "attention":
            return self.flops / (PEAK * FLASH[self.phase])
        if self.kind == "products":
            return max(self.flops / (PEAK * PRODUCTS), by_bytes)
        if self.kind == "float8 products":
            return max(self.flops / (2 * PEAK * PRODUCTS), by_bytes)
        if self.kind == "float32 products":
            return max(self.flops / FLOAT32, by_bytes)
        return max(by_bytes, SHORTEST)


_NOTHING_MOVES = {
    "view",
    "_unsafe_view",
    "t",
    "transpose",
    "permute",
    "expand",
    "slice",
    "select",
    "unsqueeze",
    "squeeze",
    "detach",
    "alias",
    "as_strided",
    "split",
    "split_with_sizes",
    "unbind",
    "narrow",
    "reshape",
    "unflatten",
    "flatten",
    "chunk",
    "view_as",
    "is_same_size",
    "lift_fresh",
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "resize_",
    "_local_scalar_dense",
    "is_pinned",
}
_GATHERS = ("index_select", "index", "gather")
_SCATTERS = ("index_add_", "scatter_add_", "index_copy_", "index_put_", "index_add", "scatter_")
_HOST_READS = ("_local_scalar_dense", "nonzero", "item")


def held(tensor: Tensor) -> int:
    """Bytes of a tensor, what is broadcast counted once."""
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count


class Counter(TorchDispatchMode):
    """Writes down every operation.

    Args:
        number: What the host reads where it asks for an integer; rows of an expert, say.

    Attributes:
        operations: In their order.
        phase: Of what comes next.
        reads: Where the host waited for the device: the operation and the line.
        copies: Between host and device, likewise.
    """

    def __init__(self, number: int = 0) -> None:
        super().__init__()
        self._number = number
        self.operations: list[Operation] = []
        self.phase = "forward"
        self.reads: list[str] = []
        self.copies: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        given = {key: value for key, value in (kwargs or {}).items() if key != "out"}
        ins = [t for t in tree_leaves((args, given)) if isinstance(t, Tensor)]
        if name in _HOST_READS and any(t.is_cuda for t in ins):
            read = f"{name} {calling_line()}"
            if [read] != self.reads[-1:] or name != "_local_scalar_dense":  # a list of numbers is one transfer
                self.reads.append(read)
        if name == "_local_scalar_dense" and isinstance(args[0], FakeTensor):
            return False if args[0].dtype == torch.bool else self._number
        if name == "nonzero" and isinstance(args[0], FakeTensor):  # as if all were
            x = args[0]
            return torch.empty(x.numel(), x.dim(), dtype=torch.int64, device=x.device)
        result = func(*args, **(kwargs or {}))
        outs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if {t.device.type for t in (*ins, *outs)} >= {"cpu", "cuda"} and name in ("_to_copy", "copy_"):
            self.copies.append(f"{name} {calling_line()}")
        if name not in _NOTHING_MOVES and outs:
            kind, flops = _work(name, args, ins)
            self.operations.append(Operation(self.phase, name, kind, _bytes(name, ins, outs), flops))
        return result


def calling_line() -> str:
    """The innermost line of the package that is running."""
    frame: Any = sys._getframe()
    while frame is not None and "/lightning_moefold/" not in frame.f_code.co_filename:
        frame = frame.f_back
    return "" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def _work(name: str, args: Any, ins: list[Tensor]) -> tuple[str, float]:
    if name in ("mm", "exact_product", "addmm", "addmm_"):
        a, b = args[1:3] if name.startswith("addmm") else args[:2]
        kind = "float32 products" if a.dtype == torch.float32 else "products"
        return kind, 2.0 * a.shape[0] * a.shape[1] * b.shape[1]
    if name in ("_grouped_mm", "_scaled_grouped_mm"):
        a, b = args[:2]
        kind = "products" if name == "_grouped_mm" else "float8 products"
        return kind, 2.0 * a.shape[0] * a.shape[1] * (b.shape[2] if b.dim() == 3 else b.shape[1])
    if "scaled_dot_product" in name:
        backward = name.endswith("backward")
        rows, heads, length, size = ins[1 if backward else 0].shape
        return "attention", (5 if backward else 2) * rows * heads * length**2 * size  # causal: half of all pairs
    return "rest", 0.0


def _bytes(name: str, ins: list[Tensor], outs: list[Tensor]) -> int:
    written = sum(t.numel() * t.element_size() for t in outs)
    if name == "triton_launch":
        return sum(map(held, ins))
    if name in _GATHERS:
        return 2 * written + held(ins[-1])
    if name in _SCATTERS:
        return 3 * held(ins[-1])
    if name in ("zero_", "fill_"):
        return written
    return sum(map(held, ins[1:] if name == "copy_" else ins)) + written


def count(layer: Slice, tokens: int = 8192, length: int = 4096) -> Counter:
    """Runs forward and backward of a layer in bfloat16 on fake CUDA tensors."""
    counter = Counter(tokens * layer.top_k // layer.experts)
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.set_default_dtype(torch.bfloat16)  # a module of fake tensors cannot be cast afterwards
        try:
            with torch.device("cuda"):
                module = layer.make()
        finally:
            torch.set_default_dtype(torch.float32)
        x_BSD = torch.empty(
            tokens // length, length, layer.hidden, dtype=torch.bfloat16, device="cuda", requires_grad=True
        )
        with counter:
            y_BSD = module(x_BSD)
            grad_BSD = torch.empty_like(y_BSD)
            counter.phase = "backward"
            y_BSD.backward(grad_BSD)
    return counter


class Figures(NamedTuple):
    """Of a layer: elementwise GB, times in ms, and shares."""

    elementwise_gb: float
    total_ms: float
    mfu: float
    host_reads: int
    copies: int
    kernels: int
    share: dict[str, float]


def figures(counter: Counter) -> Figures:
    """Sums up a count."""
    seconds: dict[str, float] = defaultdict(float)
    for operation in counter.operations:
        seconds[operation.kind] += operation.seconds
    total = sum(seconds.values())
    rest = sum(o.bytes for o in counter.operations if o.kind == "rest")
    flops = sum(o.flops for o in counter.operations if o.kind != "float32 products")
    return Figures(
        rest / 1e9, total * 1e3, flops / total / PEAK, len(counter.reads), len(counter.copies), len(counter.operations),
        {kind: value / total for kind, value in seconds.items()},
    )  # fmt: skip


def _print(found: dict[str, tuple[Counter, Figures]], top: int) -> None:
    print("| layer | elementwise GB | step ms | products | attention | rest | MFU at most | kernels | host reads |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    for name, (_, f) in found.items():
        products = sum(share for kind, share in f.share.items() if kind.endswith("products"))
        print(
            f"| {name} | {f.elementwise_gb:.1f} | {f.total_ms:.1f} | {products:.1%} | {f.share['attention']:.1%} | "
            f"{f.share['rest']:.1%} | {f.mfu:.3f} | {f.kernels} | {f.host_reads} |"
        )
    for name, (counter, _) in found.items():
        sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0, 0])
        for o in counter.operations:
            if o.kind == "rest":
                place = sums[o.phase, o.name]
                place[0], place[1], place[2] = place[0] + 1, place[1] + o.bytes, place[2] + o.seconds
        print(f"\n{name}: what moves most besides products and attention\n")
        for (phase, operation), (times, size, spent) in sorted(sums.items(), key=lambda item: -item[1][2])[:top]:
            print(f"    {phase:8s} {operation:24s} x{times:<3.0f} {size / 1e9:7.2f} GB {spent * 1e3:7.2f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--top", type=int, default=12, help="operations to list for each layer")
    parser.add_argument("--json", type=Path, help="a file for every operation")
    options = parser.parse_args()
    kernels.use_triton()
    found = {}
    slices = {**SLICES, **FLOAT8}
    for name, layer in slices.items():
        counter = count(layer, options.tokens)
        found[name] = counter, figures(counter)
    _print(found, options.top)
    if options.json:
        every = {
            name: {"slice": asdict(slices[name]), "operations": [o._asdict() for o in counter.operations]}
            for name, (counter, _) in found.items()
        }
        options.json.write_text(json.dumps(every))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # torch would tidy up a device that is not there

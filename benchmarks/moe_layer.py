# SPDX-License-Identifier: Apache-2.0
"""Forward and backward of one MoE layer, beside Hugging Face's Mixtral block, a dense layer of equal FLOPs and the matmul peak.

    python benchmarks/moe_layer.py [--cases 8/2 64/8] [--dtypes float32 bfloat16] [--threads 2] [--eager] ...

Each case (dtype, experts / top-k) has a process of its own, in which the contenders take turns, call by call. All have the
same weights, the same tokens and the same routing (the router is one module, and belongs to each contender's time), and
their outputs are compared once. Gradients go to the tokens, the router and the experts, and are cleared between calls, as
``optimizer.zero_grad()`` does.

"dense" is one SwiGLU of the experts' width on ``tokens * top-k`` rows: the same matrix products without routing and in one
piece. "matmul" is a product of 2048 x 2048 matrices, taken in every round; the fractions are medians over rounds of a
contender's FLOPs per second to those of its round's matmul. FLOPs are those of the experts, ``18 T K D F``; with more
than one thread, CPU time includes that of threads which wait, so fractions are given of wall-clock time unless
``--threads 1``. Memory is the peak above what the process had before the call, without the gradients of the weights, in a
process whose allocator returns what is freed.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measuring import RETURN_MEMORY, Clock, leave, machine, median_ratio, peak_above, run_worker
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_moefold.modules import Experts, MoELayer, Router

OURS, GROUPED, EAGER, DENSE, MATMUL = "moefold", "HF grouped_mm", "HF eager", "dense SwiGLU", "matmul"
_EDGE = 2048


class SameRouter(nn.Module):
    """Our router in the place of Hugging Face's, which rounds logits of 16-bit models and so may choose other experts."""

    def __init__(self, router: Router) -> None:
        super().__init__()
        self.router = router

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight_TK, expert_TK, probability_TE, _ = self.router(hidden.reshape(-1, hidden.shape[-1]))
        return probability_TE, weight_TK, expert_TK


class Dense(nn.Module):
    """One SwiGLU."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(hidden, width, bias=False) for _ in range(2))
        self.down = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def hugging_face(layer: MoELayer, implementation: str) -> nn.Module:
    """Hugging Face's block with the weights of ours."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    experts = layer.experts
    assert isinstance(experts, Experts)
    width, hidden = experts.gate_proj.shape[1:]
    config = MixtralConfig(
        hidden_size=hidden,
        intermediate_size=width,
        num_local_experts=layer.num_experts,
        num_experts_per_tok=layer.top_k,
    )
    config._experts_implementation = implementation
    block = MixtralSparseMoeBlock(config).to(experts.gate_proj.dtype)
    with torch.no_grad():
        block.experts.gate_up_proj.copy_(torch.cat([experts.gate_proj, experts.up_proj], 1))
        block.experts.down_proj.copy_(experts.down_proj)
    block.gate = SameRouter(layer.gate)
    return block.train()


class Case:
    """The contenders of one dtype, number of experts and top-k."""

    def __init__(self, args: argparse.Namespace, dtype: str, experts_and_top_k: str) -> None:
        torch.manual_seed(0)
        self.dtype = getattr(torch, dtype)
        experts, self.top_k = map(int, experts_and_top_k.split("/"))
        rows = args.tokens * self.top_k
        self.flops = 18 * rows * args.hidden * args.ffn
        layer = MoELayer(args.hidden, experts, self.top_k, args.ffn).to(self.dtype)
        layer.gate.float()
        self.x = torch.randn(1, args.tokens, args.hidden).to(self.dtype).requires_grad_()
        self.grad = torch.randn(1, args.tokens, args.hidden).to(self.dtype)
        self.modules: dict[str, nn.Module] = {GROUPED: hugging_face(layer, "grouped_mm"), OURS: layer}
        if args.eager or experts < 64:
            self.modules[EAGER] = hugging_face(layer, "eager")
        self.modules[DENSE] = Dense(args.hidden, args.ffn).to(self.dtype)
        self.many = torch.randn(rows, args.hidden).to(self.dtype).requires_grad_()
        self.many_grad = torch.randn(rows, args.hidden).to(self.dtype)
        self.square = torch.randn(_EDGE, _EDGE).to(self.dtype)

    def calls(self) -> dict[str, Callable[[], Any]]:
        """A forward and backward of each."""

        def step(module: nn.Module, x: Tensor, grad: Tensor) -> None:
            module(x).backward(grad)

        calls: dict[str, Callable[[], Any]] = {MATMUL: lambda: self.square @ self.square}
        for name, module in self.modules.items():
            x, grad = (self.many, self.many_grad) if name == DENSE else (self.x, self.grad)
            calls[name] = partial(step, module, x, grad)
        return calls

    def clear(self) -> None:
        """No gradient is left."""
        for module in self.modules.values():
            module.zero_grad()
        self.x.grad = self.many.grad = None

    def check(self) -> float:
        """Largest difference of an output from ours, relative to the largest element."""
        with torch.no_grad():
            ours = self.modules[OURS](self.x).float()
            others = [m(self.x).float() for n, m in self.modules.items() if n not in (OURS, DENSE)]
        error = max(((o - ours).abs().max() / ours.abs().max()).item() for o in others)
        limit = 1e-5 if self.dtype == torch.float32 else 3e-2
        assert error < limit, f"outputs differ by {error:.1e}"
        return error

    def weight_bytes(self, name: str) -> int:
        """Of the gradients that a call leaves."""
        return sum(p.numel() * p.element_size() for p in self.modules[name].parameters())


def measure_memory(args: argparse.Namespace) -> None:
    """All cases, in one process."""
    peaks = []
    for dtype in args.dtypes:
        for experts_and_top_k in args.cases:
            case, found = Case(args, dtype, experts_and_top_k), {}
            for name, call in case.calls().items():
                if name != MATMUL:
                    found[name] = peak_above(call) - case.weight_bytes(name)
                    case.clear()
            peaks.append(found)
    leave(peaks)


def measure_time(args: argparse.Namespace) -> None:
    """One case, in its own process."""
    case = Case(args, args.dtypes[0], args.cases[0])
    calls = case.calls()
    error = case.check()
    clocks = {name: Clock() for name in calls}
    for number in range(args.rounds + 1):
        for name, call in calls.items():
            if name == EAGER and args.eager and number != 1:  # takes ten times as long
                continue
            if number == 0:
                call()
            else:
                clocks[name].measure(call)
            case.clear()
    rates = {}
    time = "cpu" if torch.get_num_threads() == 1 else "wall"
    peak_seconds = getattr(clocks[MATMUL], time)
    flops = 2 * _EDGE**3
    for name, clock in clocks.items():
        taken = getattr(clock, time)
        used = peak_seconds[: len(taken)]
        work_done = flops if name == MATMUL else case.flops
        rates[name] = {
            **clock.medians(),
            "gflops": work_done / clock.medians()[time] / 1e9,
            "fraction": median_ratio(used, taken) * work_done / flops,
            "ratio": None if name == MATMUL else median_ratio(getattr(clocks[GROUPED], time)[: len(taken)], taken),
        }
    leave({"error": error, "rates": rates})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases", nargs="+", default=["8/2", "64/2", "64/8", "128/2", "128/8"], metavar="EXPERTS/TOP-K"
    )
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    for name, default in (("tokens", 4096), ("hidden", 512), ("ffn", 1024), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--eager", action="store_true", help="HF eager from 64 experts on too, one call: 10 s each")
    parser.add_argument("--worker", choices=("time", "memory"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        (measure_time if args.worker == "time" else measure_memory)(args)
        return
    print(f"{args.tokens} tokens, hidden {args.hidden}, ffn {args.ffn}, {args.threads} threads, forward + backward, median of "
          f"{args.rounds} rounds; ratios and fractions of {'CPU' if args.threads == 1 else 'wall-clock'} time")  # fmt: skip
    print(f"{machine()}\n")
    print("| dtype | experts / top-k | contender | wall ms | CPU ms | GFLOP/s | fraction of matmul | speed / HF grouped_mm | "
          "peak MB |")  # fmt: skip
    print("|---|---|---|--:|--:|--:|--:|--:|--:|")
    common = ["--eager"] if args.eager else []
    for name in ("tokens", "hidden", "ffn", "rounds"):
        common += [f"--{name}", str(getattr(args, name))]
    all_cases = ["--cases", *args.cases, "--dtypes", *args.dtypes, *common, "--worker", "memory"]
    peaks = iter(run_worker("moe_layer.py", all_cases, threads=args.threads, extra=RETURN_MEMORY))
    for dtype in args.dtypes:
        for case in args.cases:
            one = ["--cases", case, "--dtypes", dtype, *common, "--worker", "time"]
            timed, memory = run_worker("moe_layer.py", one, threads=args.threads), next(peaks)
            for name, row in timed["rates"].items():
                ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
                peak = f"{memory[name] / 1e6:.0f}" if name in memory else ""
                print(f"| {dtype} | {case} | {name} | {row['wall'] * 1e3:.0f} | {row['cpu'] * 1e3:.0f} | {row['gflops']:.0f} | "
                      f"{row['fraction']:.2f} | {ratio} | {peak} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

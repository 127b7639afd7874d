# SPDX-License-Identifier: Apache-2.0
"""A MoE layer on two gloo ranks, experts spread over both, beside DeepSpeed-MoE and Hugging Face's block under DDP.

    python benchmarks/expert_parallel.py [--experts 16] [--top-k 2] [--tokens 2048] [--threads 1] ...

One step is forward, backward and the synchronisation of gradients: the router's, and under DDP all experts'. All contenders
have the same router weights, expert weights, tokens (different on each rank), top-k and SwiGLU experts; they take turns in
the same two processes, step by step, and where nothing is dropped their outputs are compared. A step's time is that of the
slower rank, its CPU time the sum over ranks, and includes waiting where a rank waits in a loop. Routing is skewed by a bias
on the router's logits (the last column of its weight, where tokens are 1), expert e's being ``-s * log(1 + e)`` in an order
drawn once: s = 0, 0.4 and 1.

With capacity 1.0, ours drops per rank and by probability, DeepSpeed per rank and (for top-2) by position, and it divides
weights by what is left, so only sums of rows are comparable: about the same number is served. Hugging Face's block drops
nothing, and appears beside the dropless ones. Memory is the largest rank's peak above what it had before the step, gradients of
its weights included, in processes whose allocator returns what is freed.

DeepSpeed is optional, and no dependency of ours: where it cannot be imported, the table is made without it. To have it,
in an environment of its own that sees torch and ``lightning_moefold`` (a ``.pth`` file with the path of their
site-packages will do)::

    pip install --no-deps py-cpuinfo hjson msgpack einops ninja
    DS_ACCELERATOR=cpu DS_BUILD_OPS=0 pip install --no-deps --no-build-isolation deepspeed

Written against DeepSpeed 0.19.8.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from measuring import RETURN_MEMORY, Clock, Traffic, counted_traffic, leave, machine, peak_above, run_worker
from moe_layer import Dense, hugging_face
from torch import Tensor, nn

from lightning_moefold import Fold
from lightning_moefold.dispatch import DispatchConfig
from lightning_moefold.mesh import FoldedMesh
from lightning_moefold.modules import MoELayer
from lightning_moefold.parallel import Settings, Sharding, parallelize

RANKS = 2
SKEWS = {"balanced": 0.0, "mild": 0.4, "heavy": 1.0}
HF = "HF grouped_mm, DDP"


class Contender:
    """One way to compute the layer, with the gradients that ranks must share."""

    def __init__(self, module: nn.Module, router: nn.Parameter, call: Callable[[Tensor], Tensor], syncs: bool) -> None:
        self.module, self.router, self.call, self.syncs = module, router, call, syncs

    def step(self, x: Tensor, grad: Tensor) -> Tensor:
        y = self.call(x)
        y.backward(grad)
        if self.syncs:  # the one replicated weight
            dist.all_reduce(self.router.grad)
        return y.detach()

    def clear(self) -> None:
        self.module.zero_grad()


def reference(args: argparse.Namespace, bias_E: Tensor) -> MoELayer:
    """The layer on one rank that all contenders are made of."""
    torch.manual_seed(0)
    layer = MoELayer(args.hidden, args.experts, args.top_k, args.ffn)
    with torch.no_grad():
        layer.gate.weight.normal_(std=args.hidden**-0.5)  # logits of variance 1, or the bias alone would decide
        layer.gate.weight[:, -1] = bias_E
    return layer


def ours(layer: MoELayer, mesh: FoldedMesh, dispatch: DispatchConfig) -> Contender:
    layer = copy.deepcopy(layer)
    layer.dispatch = dispatch
    parallelize(layer, mesh, Settings(Sharding("none")), torch.device("cpu"))
    return Contender(layer, layer.gate.weight, layer, syncs=True)


def under_ddp(layer: MoELayer, traffic: list[Traffic]) -> Contender:
    """Hugging Face's block; ``traffic`` may hold a counter for what DDP's own reducer sends."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    block = hugging_face(copy.deepcopy(layer), "grouped_mm")
    ddp = nn.parallel.DistributedDataParallel(block)

    world = dist.group.WORLD
    assert world is not None

    def hook(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        for counter in traffic:
            buffer = bucket.buffer()
            counter.note("all_reduce of a bucket", 2 * buffer.numel() * buffer.element_size() * (1 - 1 / RANKS))
        return allreduce_hook(world, bucket)

    hook.__annotations__.clear()  # DDP checks them, and does not take them as strings
    ddp.register_comm_hook(None, hook)
    return Contender(ddp, block.get_parameter("gate.router.weight"), ddp, syncs=False)


def deepspeed(layer: MoELayer, args: argparse.Namespace, capacity: float | None) -> Contender:
    """DeepSpeed's layer with this rank's experts; the router's gradient is summed as its engine would."""
    from deepspeed.moe.layer import MoE

    with redirect_stdout(sys.stderr):
        moe = MoE(
            args.hidden, Dense(args.hidden, args.ffn), args.experts, ep_size=RANKS, k=args.top_k,
            capacity_factor=capacity or 1.0, drop_tokens=capacity is not None, use_rts=False, top2_2nd_expert_sampling=False,
        )  # fmt: skip
        moe.set_deepspeed_parallelism()
    first = dist.get_rank() * moe.num_local_experts
    with torch.no_grad():
        moe.deepspeed_moe.gate.wg.weight.copy_(layer.gate.weight)
        for number, expert in enumerate(moe.deepspeed_moe.experts.deepspeed_experts):
            for mine, stack in ((expert.gate, "gate_proj"), (expert.up, "up_proj"), (expert.down, "down_proj")):
                mine.weight.copy_(getattr(layer.experts, stack)[first + number])
    return Contender(moe, moe.deepspeed_moe.gate.wg.weight, lambda x: moe(x)[0], syncs=True)


def make(
    args: argparse.Namespace, layer: MoELayer, mesh: FoldedMesh, traffic: list[Traffic]
) -> dict[str, dict[str, Contender]]:  # fmt: skip
    """The contenders by how many tokens they drop."""
    found: dict[str, dict[str, Contender]] = {}
    for mode, capacity in (("dropless", None), ("capacity 1.0", 1.0)):
        limits: dict[str, Any] = {"capacity_factor": capacity, "drop_scope": "sub_sequence"} if capacity else {}
        group = {
            f"moefold {name}": ours(layer, mesh, DispatchConfig(name, **limits))
            for name in ("alltoall", "deduplicated")
        }
        if not capacity:
            group["moefold alltoall, 2 chunks"] = ours(layer, mesh, DispatchConfig(chunks=2))
        if args.deepspeed:
            group["DeepSpeed-MoE"] = deepspeed(layer, args, capacity)
        if not capacity:
            group[HF] = under_ddp(layer, traffic)
        found[mode] = group
    return found


def work(args: argparse.Namespace) -> None:
    """Both ranks run this; rank zero prints the figures."""
    if args.deepspeed:
        import deepspeed as ds

        with redirect_stdout(sys.stderr):
            ds.init_distributed("gloo", verbose=False)
    else:
        dist.init_process_group("gloo")
    mesh = FoldedMesh(Fold(RANKS, expert_parallel_size=RANKS), "cpu")
    leave({routing: compare(args, SKEWS[routing], mesh) for routing in args.routings})


def compare(args: argparse.Namespace, skew: float, mesh: FoldedMesh) -> dict[str, Any]:
    """All contenders under one routing."""
    order_E = torch.randperm(args.experts, generator=torch.Generator().manual_seed(5))
    layer = reference(args, -skew * torch.log1p(order_E.float()))
    generator = torch.Generator().manual_seed(mesh.rank + 1)
    x, grad = torch.randn(2, 1, args.tokens, args.hidden, generator=generator).unbind(0)
    x[..., -1] = 1.0
    x.requires_grad_()
    traffic: list[Traffic] = []
    results: dict[str, Any] = {"load": loads(layer, x)}
    for mode, group in make(args, layer, mesh, traffic).items():
        results[mode] = measure(args, group, x, grad, traffic, check=mode == "dropless")
    return results


def loads(layer: MoELayer, x: Tensor) -> dict[str, float]:
    """Largest load over the mean, of an expert and of a rank."""
    with torch.no_grad():
        chosen = layer.gate(x[0])[1].flatten().bincount(minlength=layer.num_experts).float()
    dist.all_reduce(chosen)
    ranks = chosen.view(RANKS, -1).sum(1)
    return {"expert": (chosen.max() / chosen.mean()).item(), "rank": (ranks.max() / ranks.mean()).item()}


def measure(
    args: argparse.Namespace, group: dict[str, Contender], x: Tensor, grad: Tensor, traffic: list[Traffic], check: bool
) -> dict[str, Any]:  # fmt: skip
    """Takes turns."""

    def clear(contender: Contender) -> None:
        contender.clear()
        x.grad = None

    found: dict[str, Any] = {name: {} for name in group}
    outputs = {}
    for name, contender in group.items():
        with counted_traffic() as counter:
            traffic.append(counter)
            outputs[name] = contender.step(x, grad)
            traffic.clear()
        clear(contender)
        found[name]["sent"] = largest(counter.sent)
        found[name]["collectives"] = counter.count
        if args.worker == "memory":
            found[name]["peak"] = largest(peak_above(partial(contender.step, x, grad)))
            clear(contender)
    if check:
        base = outputs["moefold alltoall"]
        for name, y in outputs.items():
            error = ((y - base).abs().max() / base.abs().max()).item()
            assert error < 1e-5, f"the output of {name} differs by {error:.1e}"
    if args.worker == "memory":
        return found
    clocks = {name: Clock() for name in group}
    for _ in range(args.rounds):
        for name, contender in group.items():
            dist.barrier()
            clocks[name].measure(partial(contender.step, x, grad))
            clear(contender)
    for name, clock in clocks.items():
        wall, cpu = torch.tensor(clock.wall), torch.tensor(clock.cpu)
        dist.all_reduce(wall, dist.ReduceOp.MAX)
        dist.all_reduce(cpu)
        found[name] |= {"wall": wall.tolist(), "cpu": cpu.tolist()}
    return found


def largest(value: float) -> float:
    """Over ranks."""
    found = torch.tensor(float(value), dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.item()


def has_deepspeed() -> str | None:
    """Its version."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}
    try:
        with redirect_stdout(sys.stderr):
            import deepspeed as ds
    except ImportError:
        return None
    return ds.__version__


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 2048), ("hidden", 512), ("ffn", 1024), ("experts", 16), ("top-k", 2), ("rounds", 7),
                          ("threads", 1)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--routings", nargs="+", choices=SKEWS, default=list(SKEWS))
    parser.add_argument("--worker", choices=("time", "memory"), help=argparse.SUPPRESS)
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    version = has_deepspeed()
    print(f"{args.tokens} tokens per rank, hidden {args.hidden}, ffn {args.ffn}, {args.experts} experts top-{args.top_k}, float32, "
          f"{RANKS} gloo ranks of {args.threads} thread(s), median of {args.rounds} steps")  # fmt: skip
    print(f"{machine()}; " + (f"DeepSpeed {version}\n" if version else "DeepSpeed is not installed and left out\n"))
    print("| routing (expert, rank load: max / mean) | mode | contender | step ms | CPU ms | step ratio | CPU ratio | MB sent/rank "
          "| collectives | peak MB/rank |")  # fmt: skip
    print("|---|---|---|--:|--:|--:|--:|--:|--:|--:|")
    command = ["--routings", *args.routings] + (["--deepspeed"] if version else [])
    for name in ("tokens", "hidden", "ffn", "experts", "top-k", "rounds"):
        command += [f"--{name}", str(getattr(args, name.replace("-", "_")))]
    timed, memory = (
        run_worker("expert_parallel.py", [*command, "--worker", kind], ranks=RANKS, threads=args.threads, extra=extra)
        for kind, extra in (("time", {}), ("memory", RETURN_MEMORY))
    )
    for routing in args.routings:
        load = timed[routing].pop("load")
        for mode, group in timed[routing].items():
            base = group.get("DeepSpeed-MoE") or group["moefold alltoall"]
            for name, row in group.items():
                wall, cpu = (statistics.median(row[key]) for key in ("wall", "cpu"))
                ratios = " | ".join(
                    f"{statistics.median(a / b for a, b in zip(row[key], base[key], strict=True)):.2f}"
                    for key in ("wall", "cpu")
                )
                peak = memory[routing][mode][name]["peak"] / 1e6
                print(f"| {routing} ({load['expert']:.1f}, {load['rank']:.2f}) | {mode} | {name} | {wall * 1e3:.0f} "
                      f"| {cpu * 1e3:.0f} | {ratios} | {row['sent'] / 1e6:.1f} | {row['collectives']} | {peak:.0f} |")  # fmt: skip


if __name__ == "__main__":
    main()

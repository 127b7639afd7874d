# SPDX-License-Identifier: Apache-2.0
"""Dispatch and combine alone, forward and backward, beside the raw collectives of the same bytes; and what they consist of.

    python benchmarks/dispatch.py [--ranks 2 4] [--experts 16] [--top-k 4] [--tokens 2048] [--hidden 512] ...

The experts do nothing: each row is its token times its weight, summed per token. "raw" is what travels in that dispatcher's
exchange of tokens there and back and, in backward, there and back again, as bare collectives on tensors that are ready:
all-to-alls of the same splits, or all-gathers and reduce-scatters. The two take turns. ``wall`` is the slower rank's, and the
ranks share this machine's cores, so permutation is dearer here, beside memory copies that pass for a network, than beside
a network; ``CPU`` is the sum over ranks.

Counted on rank zero, in forward and in backward: collectives; row copies (gathers, scatters and concatenations of floating-point
tensors whose rows have the hidden size), with the rows they copy per token of the rank; and host
synchronisations (reads of a tensor's values by the host, which on a GPU would wait for the device), of the dispatcher
alone: experts that work one by one on a CPU read the counts of theirs once more.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from measuring import Clock, counted_traffic, machine
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_moefold import Fold, comm
from lightning_moefold.dispatch import Choices, DispatchConfig, ExpertAxes, TokenDispatcher, make_dispatcher
from lightning_moefold.mesh import Axis, FoldedMesh
from lightning_moefold.modules.experts.kernels import read_tokens, sum_rows
from lightning_moefold.testing import RankPool

CONFIGS = {
    "alltoall": DispatchConfig("alltoall"),
    "alltoall, 2 chunks": DispatchConfig("alltoall", chunks=2),
    "deduplicated": DispatchConfig("deduplicated"),
    "allgather": DispatchConfig("allgather"),
}
_COPIES = {
    "index_select",
    "index",
    "index_copy_",
    "index_add_",
    "index_put_",
    "gather",
    "scatter_",
    "cat",
    "clone",
    "repeat",
}


class Operations(TorchDispatchMode):
    """Counts copies of rows, and the rows they copy."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.hidden, self.copies, self.rows = hidden, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        copied = args[3] if name in ("index_copy_", "index_add_") else out  # their source
        if name in _COPIES and copied.dim() == 2 and copied.shape[1] == self.hidden and copied.is_floating_point():
            self.copies += 1
            self.rows += copied.shape[0]
        return out


@contextmanager
def counted_reads() -> Iterator[list[str]]:
    """Reads of a tensor's values by the host, by the name of the method."""
    reads: list[str] = []

    def counted(name: str) -> Any:
        real = getattr(Tensor, name)

        def called(self: Tensor, *args: Any) -> Any:
            reads.append(name)
            return real(self, *args)

        return mock.patch.object(Tensor, name, called)

    with ExitStack() as stack:
        for name in ("tolist", "item", "nonzero", "__int__", "__bool__", "__float__", "__index__"):
            stack.enter_context(counted(name))
        yield reads


def walk(dispatcher: TokenDispatcher, x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor) -> Tensor:
    """The six steps in the order of a layer, around experts that do nothing."""
    parcels = dispatcher.dispatch_preprocess(x_TD, Choices(weight_TK, expert_TK))
    flying, returns = [dispatcher.token_dispatch(parcels[0])], []
    for number in range(len(parcels)):
        if number + 1 < len(parcels):
            flying.append(dispatcher.token_dispatch(parcels[number + 1]))
        x_AD, rows = dispatcher.dispatch_postprocess(flying[number])
        y_AD = sum_rows(read_tokens(x_AD, rows) * rows.weight_M.unsqueeze(1), rows, x_AD.shape[0])
        plan = flying[number].plan
        returns.append(dispatcher.token_combine(dispatcher.combine_preprocess(y_AD, plan), plan))
    return dispatcher.combine_postprocess(returns, [parcel.plan for parcel in flying])


def rows_between_ranks(
    dispatcher: TokenDispatcher, expert_TK: Tensor, ep: Axis, distinct: bool
) -> tuple[list[int], list[int]]:
    """Rows that this rank sends to and receives from each, one for each choice, or for each distinct rank of a token."""
    rank_TK = expert_TK // dispatcher.local_experts
    goes_TS = torch.stack([(rank_TK == s).sum(1) for s in range(ep.size)], 1)
    send_S = (goes_TS.clamp(max=1) if distinct else goes_TS).sum(0)
    table = comm.all_gather_raw(send_S, ep).view(ep.size, ep.size)
    return send_S.tolist(), table[:, ep.index].tolist()


def raw_exchange(name: str, dispatcher: TokenDispatcher, x_TD: Tensor, expert_TK: Tensor, ep: Axis) -> Any:
    """A function that calls the bare collectives of a forward and a backward."""
    if name == "allgather":
        whole = comm.all_gather_raw(x_TD, ep)

        def gather() -> None:
            for _ in range(2):
                comm.all_gather_raw(x_TD, ep)
                comm.reduce_scatter_raw(whole, ep)

        return gather
    send, receive = rows_between_ranks(dispatcher, expert_TK, ep, distinct=name == "deduplicated")
    there = torch.randn(sum(send), x_TD.shape[1])
    back = torch.randn(sum(receive), x_TD.shape[1])

    def exchange() -> None:
        for _ in range(2):
            comm.all_to_all_raw(there, send, receive, ep)
            comm.all_to_all_raw(back, receive, send, ep)

    return exchange


def job(name: str, experts: int, top_k: int, tokens: int, hidden: int, rounds: int) -> dict[str, Any]:
    """One dispatcher on this rank."""
    world = dist.get_world_size()
    mesh = FoldedMesh(Fold(world, expert_parallel_size=world), "cpu")
    dispatcher = make_dispatcher(CONFIGS[name], experts, top_k, ExpertAxes(mesh.ep, mesh.etp, mesh.axis("etp_ep")))
    generator = torch.Generator().manual_seed(mesh.rank)
    x, grad = torch.randn(2, tokens, hidden, generator=generator).unbind(0)
    weight = torch.rand(tokens, top_k, generator=generator)
    expert = torch.rand(tokens, experts, generator=generator).topk(top_k, 1).indices
    x.requires_grad_()
    weight.requires_grad_()

    def step() -> None:
        torch.autograd.grad(walk(dispatcher, x, weight, expert), [x, weight], grad)

    raw = raw_exchange(name, dispatcher, x.detach(), expert, mesh.ep)
    counts: dict[str, list[float]] = {"collectives": [], "copies": [], "rows": [], "reads": []}
    output, sent = None, 0.0
    for _ in ("forward", "backward"):
        with counted_traffic() as traffic, counted_reads() as reads, Operations(hidden) as operations:
            if output is None:
                output = walk(dispatcher, x, weight, expert)
            else:
                torch.autograd.grad(output, [x, weight], grad)
        sent += traffic.sent
        counts["collectives"].append(traffic.count)
        counts["copies"].append(operations.copies)
        counts["rows"].append(operations.rows / tokens)
        counts["reads"].append(len(reads))
    clocks = {"dispatcher": Clock(), "raw": Clock()}
    raw()
    for _ in range(rounds):
        for clock, call in ((clocks["dispatcher"], step), (clocks["raw"], raw)):
            dist.barrier()
            clock.measure(call)
    times = {key: {"wall": clock.wall, "cpu": clock.cpu} for key, clock in clocks.items()}
    return {"counts": counts, "sent": sent, "times": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    for name, default in (("experts", 16), ("top-k", 4), ("tokens", 2048), ("hidden", 512), ("rounds", 9)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    print(f"{args.tokens} tokens per rank, hidden {args.hidden}, {args.experts} experts top-{args.top_k}, "
          f"float32, one thread per rank, median of {args.rounds} rounds of forward + backward")  # fmt: skip
    print(f"{machine()}\n")
    print("| ranks | dispatcher | MB sent/rank | wall ms | raw wall ms | ratio | CPU ms | raw CPU ms | collectives (fwd, bwd) | "
          "row copies | rows copied per token | host reads |")  # fmt: skip
    print("|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    with RankPool(max(args.ranks)) as pool:
        for ranks in args.ranks:
            for name in CONFIGS:
                found = pool.run(job, name, args.experts, args.top_k, args.tokens, args.hidden, args.rounds, ranks=ranks,
                                 timeout=300)  # fmt: skip
                row = _row(found)
                print(f"| {ranks} | {name} | {row} |", flush=True)


def _row(found: list[dict[str, Any]]) -> str:
    per_round: dict[str, list[float]] = {}
    for key in ("dispatcher", "raw"):
        walls, cpus = ([rank["times"][key][kind] for rank in found] for kind in ("wall", "cpu"))
        per_round[key], per_round[f"{key} cpu"] = (
            [max(r) for r in zip(*walls, strict=True)],
            [sum(r) for r in zip(*cpus, strict=True)],
        )
    middle = {key: statistics.median(values) * 1e3 for key, values in per_round.items()}
    ratio = statistics.median(a / b for a, b in zip(per_round["dispatcher"], per_round["raw"], strict=True))
    counts = found[0]["counts"]
    cells = [f"{max(rank['sent'] for rank in found) / 1e6:.1f}", f"{middle['dispatcher']:.0f}", f"{middle['raw']:.0f}",
             f"{ratio:.2f}", f"{middle['dispatcher cpu']:.0f}", f"{middle['raw cpu']:.0f}",
             *(", ".join(f"{n:g}" for n in counts[key]) for key in ("collectives", "copies")),
             ", ".join(f"{n:.1f}" for n in counts["rows"]), ", ".join(f"{n:g}" for n in counts["reads"])]  # fmt: skip
    return " | ".join(cells)


if __name__ == "__main__":
    import dispatch  # the ranks can import what is in a module

    dispatch.main()

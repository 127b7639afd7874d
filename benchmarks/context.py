# SPDX-License-Identifier: Apache-2.0
"""Attention over a long row cut over context parallel ranks: peak memory per rank and time, for each exchange.

    python benchmarks/context.py [--length 32768] [--ranks 1 2 4] [--documents 0]

Forward and backward of causal attention alone (queries, keys and values are made on the rank, float32). Memory is the
peak of resident memory above what the process had before; each row of the table has fresh processes, in which glibc
gives freed blocks back at once (``MALLOC_MMAP_THRESHOLD_``; as it is, it keeps those below 32 MB, which are the blocks
of many ranks and not those of one). The ranks share this machine's cores, so time says nothing of real ones: it should
stay level, as the work does. What a rank keeps falls as 1 / cp; gathering keys and values adds those of some heads of
the whole row, and all-to-all a copy of heads.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from measuring import machine, resident_peak

from lightning_moefold.mesh import SINGLE, Axis
from lightning_moefold.modules.attention.blockwise import Visibility
from lightning_moefold.modules.attention.context import context_attention
from lightning_moefold.modules.attention.exchanges import Exchange
from lightning_moefold.modules.attention.layout import ContextLayout
from lightning_moefold.testing import RankPool


def attend(length: int, heads: int, kv_heads: int, size: int, exchange: Exchange, document: int) -> tuple[float, float]:
    """Seconds, and bytes above the start, of one forward and backward."""
    ranks = tuple(range(dist.get_world_size()))
    cp = Axis("cp", ranks, dist.get_rank(), dist.group.WORLD) if len(ranks) > 1 else SINGLE
    layout = ContextLayout(length, cp)
    torch.manual_seed(dist.get_rank())
    here = length // len(ranks)
    documents = (torch.arange(length) // document).unsqueeze(0) if document else None
    few = torch.zeros(1, heads, 2 * len(ranks), size)
    context_attention(few, few, few, ContextLayout(2 * len(ranks) ** 2, cp), Visibility(), "ring")  # warms up
    Path("/proc/self/clear_refs").write_text("5")
    before, start = resident_peak(), time.perf_counter()
    q, k, v = (torch.randn(1, n, here, size, requires_grad=True) for n in (heads, kv_heads, kv_heads))
    context_attention(q, k, v, layout, Visibility(None, documents), exchange).sum().backward()
    return time.perf_counter() - start, resident_peak() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-size", type=int, default=32)
    parser.add_argument("--documents", type=int, default=0, metavar="LENGTH", help="packed documents of this length")
    args = parser.parse_args()
    shape = (args.heads, args.kv_heads, args.head_size)
    print(
        f"{args.length} tokens, {args.heads} query and {args.kv_heads} key/value heads of {args.head_size}, float32"
        + (f", documents of {args.documents}" if args.documents else "")
    )
    print(f"{machine()}\n")
    print("| cp | exchange | seconds | peak MB/rank | ratio |\n|--:|---|--:|--:|--:|")
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1024 * 1024)
    base = None
    for ranks in args.ranks:
        for exchange in ["ring", "all_gather", "all_to_all"] if ranks > 1 else ["auto"]:
            with RankPool(ranks) as pool:
                rows = pool.run(attend, args.length, *shape, exchange, args.documents, ranks=ranks, timeout=550)
            seconds, memory = max(r[0] for r in rows), statistics.mean(r[1] for r in rows) / 1e6
            base = base or memory
            name = exchange if ranks > 1 else "-"
            print(f"| {ranks} | {name} | {seconds:.1f} | {memory:.0f} | {memory / base:.2f} |", flush=True)


if __name__ == "__main__":
    import context  # the ranks can import what is in a module

    context.main()

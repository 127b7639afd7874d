# SPDX-License-Identifier: Apache-2.0
"""What saving and loading cost: checksums, saves in the background, exports by all ranks at once.

    python benchmarks/checkpoints.py [load] [stall] [export] [--gigabytes 2] [--ranks 2] [--folder DIR]

load    A training checkpoint of experts is loaded with its checksums compared and not, from the page cache and, where the
        kernel lets a file be dropped from it, from disk.
stall   Seconds for which training stands still at a save, with async_save and without, and the memory of the copy.
export  Seconds to write a model in Hugging Face's format, against the same bytes written and synchronised by as many plain
        processes at once.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lightning_moefold.checkpoint.chunks import TensorPiece
from lightning_moefold.checkpoint.hf_writer import OutputTensor, write_hf_checkpoint
from lightning_moefold.checkpoint.sharded import StoredTensors, load_meta, pack, save_sharded
from lightning_moefold.layout import Box
from lightning_moefold.lifecycle.background import BackgroundSaves
from lightning_moefold.mesh import SINGLE, Axis
from lightning_moefold.testing import RankPool

EXPERT = (1408, 2048)  # of Qwen1.5-MoE-A2.7B
EXPERTS = 16


def stacks(gigabytes: float) -> dict[str, torch.Tensor]:
    """Stacks of experts of so many bytes in all, in bfloat16."""
    count = max(1, round(gigabytes * 1e9 / (EXPERTS * EXPERT[0] * EXPERT[1] * 2)))
    return {f"model.{i}": torch.full((EXPERTS, *EXPERT), float(i + 1), dtype=torch.bfloat16) for i in range(count)}


def pieces(tensors: dict[str, torch.Tensor]) -> dict[str, TensorPiece]:
    return {n: TensorPiece(t, (Box.whole(t.shape),), tuple(t.shape), stacked=True) for n, t in tensors.items()}


def forget(folder: Path) -> None:
    """Drops the files of a folder from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(action: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def load(gigabytes: float, folder: Path) -> None:
    tensors = stacks(gigabytes)
    size = sum(t.nbytes for t in tensors.values())
    path = folder / "load.ckpt"

    def write(summed: bool) -> float:
        return timed(lambda: save_sharded(pack(path, {}, SINGLE, summed=summed), pieces(tensors), SINGLE))

    written = {summed: write(summed) for summed in (False, True)}
    print(f"| write {size / 1e9:.2f} GB, synchronised | {written[False]:.2f} | | {written[True]:.2f} | |")
    plain = folder / "plain.ckpt"
    save_sharded(pack(plain, {}, SINGLE, summed=False), pieces(tensors), SINGLE)

    ways = {"torch.load": (plain, False), "unchecked": (path, False), "checked": (path, True)}

    def read(way: str) -> float:
        file, check = ways[way]
        return timed(lambda: StoredTensors(file, load_meta(file), check=check).fill(pieces(tensors)))

    for cold in (False, True):
        times: dict[str, list[float]] = {way: [] for way in ways}
        for way in ways:
            read(way)
        for _ in range(7):
            for way in ways:  # in turn, as other jobs may run
                if cold:
                    forget(ways[way][0])
                times[way].append(read(way))
        best, middle = ({way: f(found) for way, found in times.items()} for f in (min, statistics.median))
        cells = " | ".join(f"{best[way]:.2f} ({middle[way]:.2f})" for way in ways)
        more = [f"{found['checked'] / found['unchecked'] - 1:+.0%}" for found in (best, middle)]
        print(f"| load from {'disk' if cold else 'the page cache'} | {cells} | {more[0]} ({more[1]}) |", flush=True)
    shutil.rmtree(plain)
    shutil.rmtree(path)


def stall(gigabytes: float, folder: Path) -> None:
    tensors = stacks(gigabytes)
    described = pieces(tensors)
    stopped = [timed(lambda: save_sharded(pack(folder / "a.ckpt", {}, SINGLE), described, SINGLE)) for _ in range(3)]
    saves, going, whole = BackgroundSaves(SINGLE), [], []
    for _ in range(4):
        begin = time.perf_counter()
        going.append(timed(lambda: saves.start(pack(folder / "a.ckpt", {}, SINGLE), described)))
        saves.finish()
        whole.append(time.perf_counter() - begin)
    copies = sum(tensor.nbytes for tensor in saves._copies.values())
    print(
        f"| {sum(t.nbytes for t in tensors.values()) / 1e9:.2f} GB | {min(stopped):.2f} | {going[0]:.2f} | "
        f"{min(going[1:]):.2f} | {min(whole):.2f} | {copies / 1e9:.2f} GB |"
    )
    shutil.rmtree(folder / "a.ckpt")


def raw(path: Path, size: int) -> None:
    """Writes bytes and synchronises them."""
    block = memoryview(bytes(range(256)) * 65536)
    with path.open("wb") as file:
        left = size
        while left > 0:
            left -= file.write(block[: min(left, len(block))])
        file.flush()
        os.fsync(file.fileno())


def export_job(gigabytes: float, folder: str) -> tuple[float, int, int]:
    """Seconds of an export whose experts are spread over all ranks, and the most memory of this rank before and after."""
    import resource

    rank, size = dist.get_rank(), dist.get_world_size()
    share = EXPERTS // size
    count = max(1, round(gigabytes * 1e9 / (EXPERTS * EXPERT[0] * EXPERT[1] * 2)))
    mine = {f"m.{i}": torch.full((share, *EXPERT), float(i + 1), dtype=torch.bfloat16) for i in range(count)}
    owners = tuple((r, (Box((r * share, 0, 0), (share, *EXPERT)),)) for r in range(size))
    tensors = {
        name: OutputTensor(
            (EXPERTS, *EXPERT), torch.bfloat16, tuple(f"{name}.{e}" for e in range(EXPERTS)), True, owners
        )
        for name in mine
    }
    world = Axis("world", tuple(range(size)), rank, dist.group.WORLD if size > 1 else None)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = timed(lambda: write_hf_checkpoint(Path(folder, "model"), {}, tensors, mine.__getitem__, world))
    return seconds, before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def export(gigabytes: float, ranks: int, folder: Path) -> None:
    size = round(gigabytes * 1e9)
    fork = multiprocessing.get_context("fork")
    with RankPool(ranks) as pool:
        for _ in range(3):
            processes = [fork.Process(target=raw, args=(folder / f"raw-{i}", size // ranks)) for i in range(ranks)]

            def together(started: list[Any] = processes) -> None:
                for process in started:
                    process.start()
                for process in started:
                    process.join()

            plain = timed(together)
            for path in folder.glob("raw-*"):
                path.unlink()
            job = importlib.import_module("checkpoints").export_job  # as ranks import it
            found = pool.run(job, gigabytes, str(folder), ranks=ranks, timeout=600.0)
            ours = max(seconds for seconds, _, _ in found)
            files = len(list((folder / "model").glob("*.safetensors")))
            more = max(after - before for _, before, after in found) / 1e6
            print(
                f"| {gigabytes:.2f} GB, {files} files | {plain:.2f} | {ours:.2f} | {plain / ours:.2f} | {more:.2f} GB |",
                flush=True,
            )
            shutil.rmtree(folder / "model")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["load", "stall", "export"])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; by default that of temporary files")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        if "load" in arguments.parts:
            print(
                "| seconds: best (median) | no checksums, torch.load | not compared | compared | more |\n|---|--:|--:|--:|--:|"
            )
            load(arguments.gigabytes, Path(folder))
        if "stall" in arguments.parts:
            print(
                "\n| state | save, s | stall, first | stall, later | until complete | copy |\n|--:|--:|--:|--:|--:|--:|"
            )
            stall(arguments.gigabytes, Path(folder))
        if "export" in arguments.parts:
            print("\n| model | raw, s | export, s | speed / raw | memory more |\n|---|--:|--:|--:|--:|")
            export(arguments.gigabytes, arguments.ranks, Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())

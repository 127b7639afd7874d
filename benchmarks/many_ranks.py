# SPDX-License-Identifier: Apache-2.0
"""What a thousand ranks would say to each other at start-up, on errors and at a save, counted in one process.

    python benchmarks/many_ranks.py [--gpus 256 1024] [--model mixtral-8x22b] [--fold "tp2 pp8 | ep8"]

torch's fake process group stands for the other ranks. A rank of each kind builds its groups and its part of the model; each
group and each message of objects is counted. What all ranks write at a save follows from the layouts alone: the chunks of each,
their list as the first rank gathers and writes it, and the time that a rank needs to read it.
"""

from __future__ import annotations

import argparse
import pickle
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from lightning_moefold.agreement import agree_on_error
from lightning_moefold.checkpoint.chunk_reader import StoredTensors
from lightning_moefold.checkpoint.chunks import LIST, SUMS, TensorPiece, Written, write_list
from lightning_moefold.fold import Fold
from lightning_moefold.mesh import FoldedMesh, forget_groups
from lightning_moefold.models import MoECausalLM, MoEConfig
from lightning_moefold.models.weights import deferred_weights
from lightning_moefold.parallel import Settings, parallelize
from lightning_moefold.parallel.parameters import ParameterRegistry
from lightning_moefold.planner import MODELS

FOLDS = {"mixtral-8x22b": "tp2 pp8 | ep8", "qwen2-57b-a14b": "tp2 pp4 | ep4"}
STATES = (
    "model.model.{}",
    "optimizer.0.model.{}.exp_avg",
    "optimizer.0.model.{}.exp_avg_sq",
    "optimizer.0.model.{}.step",
)


class Counts:
    """What one rank does: groups with their sizes, and messages of objects with the bytes that it gets."""

    def __init__(self) -> None:
        self.groups: list[int] = []
        self.messages: list[tuple[str, int, int]] = []

    @contextmanager
    def around(self) -> Iterator[None]:
        """Counts what is called meanwhile; the other ranks answer as this one."""
        create = dist.new_group

        def new_group(ranks: Any = None, *arguments: Any, **options: Any) -> Any:
            self.groups.append(dist.get_world_size() if ranks is None else len(ranks))
            options["backend"] = "fake"
            return create(ranks, *arguments, **options)

        def all_gather(out: list[Any], mine: Any, group: Any = None) -> None:
            out[:] = [mine] * len(out)
            self.messages.append(("all-gather", len(out), len(pickle.dumps(mine)) * len(out)))

        def broadcast(items: list[Any], src: int = 0, group: Any = None, **_: Any) -> None:
            self.messages.append(("broadcast", dist.get_world_size(group), len(pickle.dumps(items))))

        with ExitStack() as stack:
            for name, function in (
                ("new_group", new_group), ("all_gather_object", all_gather), ("broadcast_object_list", broadcast),
            ):  # fmt: skip
                stack.enter_context(mock.patch.object(dist, name, function))
            yield

    def told(self) -> str:
        return (
            f"{len(self.groups)} groups of {sorted(self.groups)} ranks ({sum(size - 1 for size in self.groups)} connections), "
            f"{len(self.messages)} messages of objects, {sum(size for *_, size in self.messages) / 1e3:.1f} kB received"
        )


def start_up(config: MoEConfig, fold: Fold, rank: int) -> MoECausalLM:
    """Builds a rank's mesh and model; prints what it said."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=fold.world_size, store=FakeStore())
    try:
        counts, begin = Counts(), time.perf_counter()
        with counts.around():
            mesh = FoldedMesh(fold, "cpu")
        seconds = time.perf_counter() - begin
        print(f"rank {rank}, groups: {counts.told()}, {seconds:.2f} s")
        with deferred_weights(), torch.device("meta"):
            model = MoECausalLM(config)
        counts = Counts()
        with counts.around():
            parallelize(model, mesh, Settings(), torch.device("meta"))
            registry = ParameterRegistry(model, mesh)
        print(f"rank {rank}, set-up: {counts.told()}")
        for what, action in {
            "one agreement on errors": lambda: agree_on_error(None, mesh.world),
            "placements of experts at a load": registry.everyones_placements,
            "group of saves in the background": lambda: mesh.saves,
        }.items():
            counts = Counts()
            with counts.around():
                action()
            print(f"rank {rank}, {what}: {counts.told()}")
        return model
    finally:
        forget_groups()
        dist.destroy_process_group()


def written_by(model: MoECausalLM, fold: Fold, rank: int) -> Written:
    """What a rank writes at a save: the weights and AdamW's state."""
    written = Written(f"__{rank}_0.distcp")
    position = 0
    for name, layout in model.layouts.items():
        if not layout.is_owner(fold, rank):
            continue
        boxes = layout.boxes(fold, rank)
        sizes = layout.stored_box(fold, rank).sizes
        piece = TensorPiece(torch.empty(sizes, device="meta"), boxes, layout.shape, True, layout.is_expert_stack)
        for template in STATES[:3]:
            full = template.format(name)
            written.tensors[full] = torch.float32, layout.shape
            for box, _ in piece.chunks():
                length = box.numel * 4 + 1600
                written.chunks.append((full, box.offsets, box.sizes, position, length, "0123456789abcdef", 704))
                position += length
        if rank == 0:
            full = STATES[3].format(name)
            written.tensors[full] = torch.float32, ()
            written.chunks.append((full, (), (), position, 1600, "0123456789abcdef", 704))
            position += 1600
    return written


def save(model: MoECausalLM, fold: Fold) -> None:
    """Prints what a save of all ranks would gather and write."""
    begin = time.perf_counter()
    parts = [written_by(model, fold, rank) for rank in range(fold.world_size)]
    seconds = time.perf_counter() - begin
    sizes = [len(pickle.dumps(part)) for part in parts]
    chunks = [len(part.chunks) for part in parts]
    print(
        f"save: {sum(1 for count in chunks if count) + 3} files, {sum(chunks)} chunks ({max(chunks)} on a rank, "
        f"{seconds / len(parts) * 1e3:.0f} ms to list); the first rank gathers {sum(sizes) / 1e6:.1f} MB, padded "
        f"{max(sizes) * len(sizes) / 1e6:.1f} MB"
    )
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        write_list(Path(folder), parts, True)
        writing = time.perf_counter() - begin
        size = {name: Path(folder, name).stat().st_size / 1e6 for name in (LIST, SUMS)}
        begin = time.perf_counter()
        StoredTensors(folder, {})
        reading = time.perf_counter() - begin
    print(
        f"list: {size[LIST]:.1f} MB and checksums {size[SUMS]:.1f} MB, written by the first rank in {writing:.1f} s, read by each "
        f"in {reading:.1f} s"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--model", choices=MODELS, default="mixtral-8x22b")
    parser.add_argument("--fold")
    arguments = parser.parse_args()
    for gpus in arguments.gpus:
        fold = Fold.parse(arguments.fold or FOLDS.get(arguments.model, "| ep8"), gpus)
        print(f"\n{arguments.model}, {fold}, {gpus} ranks")
        for rank in (0, gpus - 1):
            model = start_up(MODELS[arguments.model], fold, rank)
        save(model, fold)
    return 0


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""Processes killed at random moments: nothing that was complete is lost, nothing incomplete is seen or left behind.

    python benchmarks/kills.py [--kills 100] [--ranks 2] [--parts save background export] [--seed 0]

Ranks save the states of steps 1, 2, 3, ... without a pause, so that every moment is one of a save; ``kill -9`` ends one of them or
all. Then

    the ranks that are left end by themselves within a minute,
    every checkpoint under its name loads, with all its checksums, and holds the state of one step, bit for bit,
    the newest step that all ranks had finished is there (of two that are kept), or a newer one,
    after the next start's sweep there is nothing else in the directory.

Parts: ``save`` is a training checkpoint under a new name, of which the last two are kept; ``replace`` one under the same name;
``background`` like ``save``, in the background; ``export`` a Hugging Face directory that is replaced; ``load`` reads a checkpoint
again and again; ``move`` trains a small model, and moves experts between ranks ten times after every step, before it saves (what is
saved must be the state of a run that was not killed, so more than one rank is needed). Ranks are forks of this process with a
process group each, so that a kill costs no imports. Exit status 0 if all of this held.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader
from training import Finetune

from lightning_moefold import MoEFoldStrategy
from lightning_moefold.agreement import agreeing
from lightning_moefold.balance.placement import Placement
from lightning_moefold.checkpoint import HFCheckpoint
from lightning_moefold.checkpoint.chunk_reader import StoredTensors
from lightning_moefold.checkpoint.chunks import TensorPiece
from lightning_moefold.checkpoint.drafts import remove_directory, sweep
from lightning_moefold.checkpoint.hf_writer import OutputTensor, write_hf_checkpoint
from lightning_moefold.checkpoint.sharded import load_meta, pack, save_sharded
from lightning_moefold.layout import Box
from lightning_moefold.lifecycle.background import BackgroundSaves
from lightning_moefold.mesh import SINGLE, Axis
from lightning_moefold.testing import PoolEnvironment, make_checkpoint

PARTS = ("save", "replace", "background", "export", "load", "move")
SHAPE = (8, 64, 64)
TENSORS = 6
#: Steps of the part ``move``; kills come before.
MOVES = 12


def state(step: int) -> dict[str, torch.Tensor]:
    """The tensors of a step; no two steps have one in common."""
    base = torch.arange(torch.Size(SHAPE).numel(), dtype=torch.float32).view(SHAPE)
    return {f"t{i}": base + 1000 * step + i for i in range(TENSORS)}


def piece(tensor: torch.Tensor, rank: int, ranks: int) -> TensorPiece:
    share = SHAPE[0] // ranks
    box = Box((rank * share, 0, 0), (share, *SHAPE[1:]))
    return TensorPiece(tensor[box.slices()].contiguous(), (box,), SHAPE, stacked=True)


class Saver:
    """What a rank does at each step."""

    def __init__(self, part: str, folder: Path, world: Axis) -> None:
        self.part, self.folder, self.world = part, folder, world
        self.saves = BackgroundSaves(world)

    def save(self, step: int) -> int:
        """Saves a step; returns the newest one that is complete then."""
        tensors = {name: piece(t, self.world.index, self.world.size) for name, t in state(step).items()}
        if self.part == "export":
            self.export(step, tensors)
            return step
        path = self.folder / ("same.ckpt" if self.part == "replace" else f"step={step}.ckpt")
        if self.part == "background":
            self.saves.finish()
            self.saves.start(pack(path, {"step": step}, self.world), tensors)
            self.remove(step - 2, self.saves.remove)
            return step - 1
        save_sharded(pack(path, {"step": step}, self.world), tensors, self.world)
        if self.part == "save":
            self.remove(step - 2, lambda action: action())
        return step

    def remove(self, step: int, do: Callable[[Callable[[], None]], None]) -> None:
        if step > 0 and self.world.index == 0:
            do(lambda: remove_directory(self.folder / f"step={step}.ckpt"))

    def export(self, step: int, tensors: dict[str, TensorPiece]) -> None:
        ranks = range(self.world.size)
        owners = tuple((rank, piece(torch.empty(SHAPE, device="meta"), rank, len(ranks)).boxes) for rank in ranks)
        described = {
            name: OutputTensor(SHAPE, torch.float32, tuple(f"{name}.{i}" for i in range(SHAPE[0])), True, owners)
            for name in tensors
        }
        write_hf_checkpoint(
            self.folder / "model",
            {"step": step},
            described,
            lambda name: tensors[name].piece,
            self.world,
            max_shard_size=300_000,
        )


def rank_main(part: str, folder: Path, rank: int, ranks: int, done: Synchronized[int]) -> None:
    """Saves until it is killed; notes on the first rank what is complete."""
    torch.set_num_threads(1)
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "NODE_RANK": "0"})
    world = SINGLE
    if ranks > 1:
        store = dist.FileStore(str(folder.parent / f"store-{folder.name}"), ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
        world = Axis("world", tuple(range(ranks)), rank, dist.group.WORLD)
    if part == "move":
        train_and_move(folder, done)
        return
    if part == "load":
        read_again(folder / "step=1.ckpt", world, done)
    saver = Saver(part, folder, world)
    step = 0
    while True:
        step += 1
        complete = saver.save(step)
        if rank == 0:
            done.value = complete


def read_again(path: Path, world: Axis, done: Synchronized[int]) -> NoReturn:
    """Loads this rank's part of a checkpoint without a pause."""
    while True:
        wanted = {n: piece(torch.zeros(SHAPE), world.index, world.size) for n in state(1)}
        with agreeing(world):
            StoredTensors(path, load_meta(path)).fill(wanted)
        if world.index == 0:
            done.value += 1


class MoveAndSave(Callback):
    """Moves all experts to and fro after a step, by draws from its number, saves, and keeps the last two checkpoints."""

    def __init__(self, folder: Path, done: Synchronized[int] | None) -> None:
        self.folder, self.done = folder, done

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        strategy: Any = trainer.strategy
        step, draw = trainer.global_step, random.Random(trainer.global_step)
        for _ in range(10):
            layers = strategy.registry.moe_layers()
            slots = range(layers[min(layers)].num_experts)
            strategy.move_experts(
                {n: Placement(tuple(draw.sample(slots, len(slots))), strategy.fold.ep) for n in sorted(layers)}
            )
        trainer.save_checkpoint(self.folder / f"step={step}.ckpt")
        if self.done is not None and trainer.is_global_zero:
            self.done.value = step
            if step > 2:
                remove_directory(self.folder / f"step={step - 2}.ckpt")


class Moving(Finetune):
    """A few batches, different on each rank."""

    def train_dataloader(self) -> Any:
        draw = torch.Generator().manual_seed(self.folded.dp_rank)
        rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(96, (MOVES, 2, 8), generator=draw)]
        return DataLoader(rows, batch_size=None)  # type: ignore[arg-type]


def train_and_move(folder: Path, done: Synchronized[int] | None) -> None:
    """Trains to the end of the data, or until it is killed."""
    trainer = pl.Trainer(
        strategy=MoEFoldStrategy(expert_parallel_size=dist.get_world_size()), accelerator="cpu", max_epochs=1, logger=False,
        devices=dist.get_world_size(), plugins=[PoolEnvironment()], callbacks=[MoveAndSave(folder, done)],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(Moving(folder.parent / "model"))


def prepare(part: str, folder: Path) -> None:
    """Writes what the ranks begin with."""
    folder.mkdir()
    if part == "load":
        tensors = {n: TensorPiece(t, (Box.whole(t.shape),), SHAPE, stacked=True) for n, t in state(1).items()}
        save_sharded(pack(folder / "step=1.ckpt", {"step": 1}, SINGLE), tensors, SINGLE)
    elif part == "move":
        make_checkpoint(folder.parent / "model", "qwen3_moe", num_experts=4)


def _read(path: Path) -> tuple[int, dict[str, torch.Tensor]]:
    if path.name == "model":
        import json

        stored = HFCheckpoint(path)
        tensors = {
            f"t{i}": torch.stack([stored.read(f"t{i}.{e}", ()) for e in range(SHAPE[0])]) for i in range(TENSORS)
        }
        return json.loads((path / "config.json").read_text())["step"], {n: t.clone() for n, t in tensors.items()}
    meta = load_meta(path)
    kept = StoredTensors(path, meta)
    return meta["step"] if "step" in meta else meta["global_step"], {name: kept.read(name) for name in kept.items}


def judge(folder: Path, complete: int, expect: Callable[[int], dict[str, torch.Tensor]]) -> str:
    """What is wrong with what the killed processes have left; empty if nothing is."""
    sweep(folder)
    steps = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            return f"{path.name} is left behind"
        try:
            step, tensors = _read(path)
        except Exception as error:
            return f"{path.name} does not load: {error}"
        expected = expect(step)
        if set(tensors) != set(expected) or not all(torch.equal(tensors[name], expected[name]) for name in expected):
            return f"{path.name} is not the state of step {step}"
        steps.append(step)
    if complete > 0 and max(steps, default=0) < complete:
        return f"step {complete} was complete, and there is {steps}"
    return ""


def unharmed(ranks: int, folder: Path) -> Callable[[int], dict[str, torch.Tensor]]:
    """Trains and moves without a kill; returns what gives the state of a step."""
    prepare("move", folder)
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=rank_main, args=("move", folder, rank, ranks, None)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return lambda step: _read(folder / f"step={step}.ckpt")[1]


def kill_once(
    part: str, ranks: int, draw: random.Random, folder: Path, expect: Callable[[int], dict[str, torch.Tensor]]
) -> tuple[str, bool, int]:
    """Starts ranks, kills; returns what is wrong, whether a save was cut off, and the step that was complete."""
    fork = multiprocessing.get_context("fork")
    done: Any = fork.Value("i", 0)
    processes = [
        fork.Process(target=rank_main, args=(part, folder, rank, ranks, done), daemon=True) for rank in range(ranks)
    ]
    quiet = os.open(os.devnull, os.O_WRONLY)
    kept = os.dup(2)
    os.dup2(quiet, 2)  # the ranks that are left end with a traceback
    try:
        for process in processes:
            process.start()
    finally:
        os.dup2(kept, 2)
    until = time.monotonic() + 60
    while done.value < 2 and time.monotonic() < until:
        time.sleep(0.002)
    if done.value < 2:
        for process in processes:
            process.kill()
        return "the ranks have not done their work twice within a minute", False, 0
    time.sleep(draw.uniform(0, 0.5 if part == "move" else 0.15))
    victims = processes if draw.random() < 0.5 else [draw.choice(processes)]
    for process in victims:
        process.kill()
    complete = done.value if victims is processes else 0
    for process in processes:
        process.join(60)
        if process.is_alive():
            process.kill()
            return "a rank that was left has not ended within a minute", False, 0
    complete = min(complete or done.value, 1 if part == "load" else MOVES)
    cut = any(path.suffix in (".tmp", ".old", ".lease") for path in folder.iterdir())
    return judge(folder, complete, expect), cut, complete


def run(parts: list[str], kills: int, ranks: int, seed: int) -> int:
    """Returns the number of faults."""
    faults = 0
    for part in parts:
        begin, cut_off, steps = time.monotonic(), 0, 0
        whole = tempfile.TemporaryDirectory()
        expect = state if part != "move" else unharmed(ranks, Path(whole.name, "run"))
        for number in range(kills):
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch, "run")
                prepare(part, folder)
                wrong, cut, complete = kill_once(part, ranks, random.Random(f"{part} {seed + number}"), folder, expect)
            cut_off += cut
            steps += complete
            if wrong:
                faults += 1
                print(f"{part}, kill {seed + number}: {wrong}", flush=True)
        print(
            f"{part}: {kills} kills on {ranks} ranks in {time.monotonic() - begin:.0f} s, {cut_off} left a draft, {steps} saves "
            f"were complete, {faults} faults so far",
            flush=True,
        )
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="of each part")
    parser.add_argument("--ranks", type=int, default=2, choices=(1, 2, 4, 8))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seed", type=int, default=0, help="number of the first kill")
    arguments = parser.parse_args()
    return 1 if run(arguments.parts, arguments.kills, arguments.ranks, arguments.seed) else 0


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""One contender's training steps under the Lightning Trainer; prints one line of JSON on rank zero.

Run by ``run.py``; by hand: ``python benchmarks/step.py moefold --checkpoint DIR`` or under ``torchrun``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_moefold import MoECausalLM, MoEFoldStrategy


class Tokens(Dataset[dict[str, torch.Tensor]]):
    """Random tokens: what they are does not change the work."""

    def __init__(self, rows: int, length: int, vocab: int) -> None:
        self.rows, self.length, self.vocab = rows, length, vocab

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, self.vocab, (self.length,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


class Clock(pl.Callback):
    """Wall-clock and CPU time of each optimizer step; a GPU is waited for at its end."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self._start = time.perf_counter(), time.process_time()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        self.wall.append(time.perf_counter() - self._start[0])
        self.cpu.append(time.process_time() - self._start[1])


class Contender(pl.LightningModule):
    """Hugging Face's model or ours, trained alike."""

    def __init__(self, name: str, checkpoint: str) -> None:
        super().__init__()
        self.name, self.checkpoint = name, checkpoint
        self.model: Any = None  # theirs or ours

    def configure_model(self) -> None:
        if self.model is not None:
            return
        if self.name.startswith("moefold"):
            self.model = MoECausalLM.from_pretrained(self.checkpoint)
            return
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(self.checkpoint, dtype=torch.float32).train()
        self.model.config.use_cache = False
        if self.name == "hf-fsdp2":
            from torch.distributed.fsdp import fully_shard

            assert self.device_mesh is not None
            mesh = self.device_mesh["data_parallel"]
            for layer in self.model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(self.model, mesh=mesh)

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4, fused=True)


def strategy(name: str, world: int) -> Any:
    if name.startswith("moefold"):
        return MoEFoldStrategy(fold=name.partition(":")[2] or "")
    if name == "hf-fsdp2":
        from lightning.pytorch.strategies import ModelParallelStrategy

        return ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1)
    return "ddp" if world > 1 else "auto"


def _resident_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("contender", help="hf, hf-fsdp2, moefold, or moefold:FOLD")
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--rows", type=int, default=4, help="per rank")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--precision", default="32-true")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    world = int(os.environ.get("WORLD_SIZE", 1))
    vocab = json.loads((Path(args.checkpoint) / "config.json").read_text())["vocab_size"]
    fold_dp = world
    if args.contender.startswith("moefold"):
        from lightning_moefold import Fold

        fold_dp = Fold.parse(args.contender.partition(":")[2], world).dp
    rows = args.rows * world // fold_dp  # the same global batch for everyone
    clock = Clock()
    trainer = pl.Trainer(
        accelerator="auto", devices=world, strategy=strategy(args.contender, world), max_steps=args.steps, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, precision=args.precision,
        callbacks=[clock], default_root_dir=tempfile.gettempdir(),
    )  # fmt: skip
    loader = DataLoader(Tokens(rows * fold_dp * args.steps, args.length, vocab), batch_size=rows)
    trainer.fit(Contender(args.contender, args.checkpoint), loader)
    device = trainer.strategy.root_device
    on_gpu = device.type == "cuda"
    held = torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else _resident_gib()
    peak = torch.tensor(held, device=device)
    cpu = torch.tensor(statistics.median(clock.cpu[2:]), device=device)
    if world > 1:
        torch.distributed.all_reduce(peak, op=torch.distributed.ReduceOp.MAX)
        torch.distributed.all_reduce(cpu)
    if trainer.global_rank == 0:
        seconds = statistics.median(clock.wall[2:])
        tokens = args.rows * world * args.length
        print("RESULT", json.dumps({"seconds": seconds, "cpu_seconds": cpu.item(), "tokens_per_second": tokens / seconds,
                                    "peak_gb": peak.item()}))  # fmt: skip
    if world > 1:
        torch.distributed.destroy_process_group()  # a process that ends with open groups may abort


if __name__ == "__main__":
    main()

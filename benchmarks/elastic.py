# SPDX-License-Identifier: Apache-2.0
"""A node lost in mid-training: the others go on from the newest complete checkpoint, under another fold, with the same losses.

    python benchmarks/elastic.py [--steps 12]

Two launcher agents on this machine train a small model together:

    torchrun --nnodes 1:2 --max-restarts 3 --rdzv-backend c10d ...

After some steps ``kill -9`` ends the second agent with its ranks. The first agent starts its own ranks again, which go on by
``ckpt_path="last"``. ``fold=["| ep4", "tp2 | ep2"]`` gives them the first fold that they can form; the global batch and the number
of micro-batches stay, so the rows of each data rank grow. Losses of all steps, repeated ones too, are compared with those of a run
that was never interrupted (one agent with all ranks). Exit status 0 if all agree to 1e-9.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import psutil
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader
from training import Finetune

from lightning_moefold import MoEFoldStrategy, ResumableSampler
from lightning_moefold.testing import make_checkpoint

ROWS, LENGTH, BATCH, KILLED_AFTER = 44, 8, 8, 4


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Random rows; five batches of eight and a half make an epoch."""

    def __init__(self) -> None:
        self.rows_RL = torch.randint(96, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.rows_RL)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows_RL[index], "labels": self.rows_RL[index]}


class Logged(Finetune):
    """Writes down the loss of every step, and under which fold it was."""

    def __init__(self, path: Path, log: Path) -> None:
        super().__init__(path, output_router_logits=True)
        self.file = log

    def train_dataloader(self) -> Any:
        data = Rows()
        rows = BATCH // self.folded.dp_size
        return DataLoader(data, batch_size=rows, sampler=ResumableSampler(data), num_workers=1)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.trainer.is_global_zero:
            line = {
                "step": self.global_step + 1, "loss": loss.item(), "fold": str(self.folded.fold),
                "rows": len(batch["input_ids"]), "restart": os.environ["TORCHELASTIC_RESTART_COUNT"], "time": time.time(),
            }  # fmt: skip
            with self.file.open("a") as file:
                file.write(json.dumps(line) + "\n")
        return loss


def train(arguments: argparse.Namespace) -> None:
    """What each rank runs, the first time and every other."""
    folder = arguments.worker
    trainer = pl.Trainer(
        strategy=MoEFoldStrategy(fold=["| ep4", "tp2 | ep2"], num_microbatches=2), accelerator="cpu",
        devices=int(os.environ["LOCAL_WORLD_SIZE"]), num_nodes=int(os.environ["GROUP_WORLD_SIZE"]), precision="64-true",
        max_steps=arguments.steps, callbacks=[ModelCheckpoint(folder / "saved", every_n_train_steps=1, save_last=True)],
        logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(Logged(folder.parent / "model", folder / "log.jsonl"), ckpt_path="last")


def agent(folder: Path, nodes: str, ranks: int, port: int, steps: int) -> subprocess.Popen[bytes]:
    """Starts a launcher agent."""
    # An agent that is not heard of for ten seconds is gone; ranks are started ten seconds after the least number of agents.
    settings = "keep_alive_interval=2,keep_alive_max_attempt=5,last_call_timeout=10"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", nodes, "--nproc-per-node", str(ranks), "--max-restarts", "3",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", folder.name, "--rdzv-conf", settings,
        __file__, "--worker", str(folder), "--steps", str(steps),
    ]  # fmt: skip
    root = str(Path(__file__).parents[1])
    # With a store shared by all rounds, agents of torch 2.13 that come later wait for an address which nobody tells them.
    shared = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    environment = {**os.environ, **shared, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([root, *sys.path[1:]])}
    with (folder / "output.txt").open("ab") as output:
        return subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )


def end(agents: list[subprocess.Popen[bytes]]) -> None:
    """Kills agents and their ranks at once, as when a machine loses power."""
    for one in agents:
        if one.poll() is None:
            process = psutil.Process(one.pid)
            for victim in (process, *process.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    victim.kill()
        one.wait()


def read(folder: Path) -> list[dict[str, Any]]:
    log = folder / "log.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def wait(agents: list[subprocess.Popen[bytes]], folder: Path, step: int, seconds: float) -> None:
    """Waits until a step has begun or the first agent has ended."""
    until = time.monotonic() + seconds
    while agents[0].poll() is None and not any(line["step"] >= step for line in read(folder)):
        if time.monotonic() > until:
            raise SystemExit(f"no step {step} after {seconds:.0f} s:\n{(folder / 'output.txt').read_text()[-4000:]}")
        time.sleep(0.02)


def run(folder: Path, steps: int, kill: bool) -> tuple[list[dict[str, Any]], float]:
    """Trains; returns what was logged, and when the second agent was killed."""
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    killed, agents = 0.0, []
    try:
        if kill:
            agents = [agent(folder, "1:2", 2, port, steps)]
            time.sleep(3)  # so that it is the first that has the rendezvous
            agents.append(agent(folder, "1:2", 2, port, steps))
            wait(agents, folder, KILLED_AFTER + 1, 300)
            end(agents[1:])
            killed = time.time()
        else:
            agents = [agent(folder, "1", 4, port, steps)]
        wait(agents, folder, steps, 600)
        if agents[0].wait(120):
            raise SystemExit(f"the first agent has failed:\n{(folder / 'output.txt').read_text()[-4000:]}")
    finally:
        end(agents)
    return read(folder), killed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        train(arguments)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        make_checkpoint(Path(scratch, "model"), "qwen3_moe", num_experts=4)
        whole, _ = run(Path(scratch, "whole"), arguments.steps, kill=False)
        lost, killed = run(Path(scratch, "lost"), arguments.steps, kill=True)
    expected = {line["step"]: line["loss"] for line in whole}
    worst = 0.0
    for line in lost:
        difference = abs(line["loss"] / expected[line["step"]] - 1)
        worst = max(worst, difference)
        print(
            f"step {line['step']:2d}  {line['fold']}  rows {line['rows']}  loss {line['loss']:.12f}  {difference:.1e}"
        )
    after = [line for line in lost if line["time"] > killed and line["fold"] != lost[0]["fold"]]
    print(
        f"{len(lost)} steps, the second agent killed in step {KILLED_AFTER + 1}; the first went on with step {after[0]['step']} "
        f"{after[0]['time'] - killed:.0f} s later under {after[0]['fold']}; largest relative difference of a loss {worst:.1e}"
    )
    assert [line["step"] for line in after] == list(range(after[0]["step"], arguments.steps + 1))
    return 0 if worst < 1e-9 and set(expected) == {line["step"] for line in lost} else 1


if __name__ == "__main__":
    sys.exit(main())

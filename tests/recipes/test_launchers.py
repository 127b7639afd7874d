# SPDX-License-Identifier: Apache-2.0
"""One command that starts its ranks, torchrun and SLURM: the same losses and weights, bit for bit."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_moefold.cli.main import main
from tests.recipes.running import CONFIG, ROOT, arguments, logged

Launch = Callable[[list[str], int], list[tuple[list[str], dict[str, str]]]]
MODULE = ["-m", "lightning_moefold", "fit"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def one_command(words: list[str], ranks: int) -> list[tuple[list[str], dict[str, str]]]:
    return [([sys.executable, *MODULE, *words, "--trainer.devices", str(ranks)], {})]


def two_agents(words: list[str], ranks: int) -> list[tuple[list[str], dict[str, str]]]:
    """torchrun on two nodes, both this machine."""
    port = str(free_port())
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", str(ranks // 2)]
    where = ["--master-addr", "127.0.0.1", "--master-port", port]
    return [([*torchrun, "--node-rank", str(node), *where, *MODULE, *words], {}) for node in range(2)]


def slurm(words: list[str], ranks: int) -> list[tuple[list[str], dict[str, str]]]:
    """As `srun` sets it for two nodes."""
    node_size = ranks // 2
    common = {
        "SLURM_NTASKS": ranks, "SLURM_NTASKS_PER_NODE": node_size, "SLURM_NNODES": 2, "SLURM_JOB_NAME": "train",
        "SLURM_JOB_ID": 4242, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(),
    }  # fmt: skip
    started = []
    for rank in range(ranks):
        mine = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank % node_size, "SLURM_NODEID": rank // node_size}
        started.append(([sys.executable, *MODULE, *words], {k: str(v) for k, v in (common | mine).items()}))
    return started


def run(launch: Launch, ranks: int, folder: Path, output: Path, **changes: object) -> None:
    config = output.with_suffix(".yaml")
    config.write_text(re.sub(r"\n  devices: .*", "", CONFIG.read_text()))  # the launchers know
    words = arguments(folder, output, config, trainer__devices=None, **changes)
    # More than one thread, where the machine has them, would be shared out differently by each launcher.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")} | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(command, cwd=ROOT, env=environment | more, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command, more in launch(words, ranks)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(outputs)


def outcome(output: Path, tmp_path: Path) -> tuple[list[dict[str, str]], bytes]:
    """Everything logged that is no time, and the weights as `moefold export` writes them."""
    [version] = [path.name for path in (output / "lightning_logs").iterdir()]
    names = ("step", "train/loss", "train/aux_loss", "val/loss", "val/perplexity")
    rows = [{name: row[name] for name in names} for row in logged(output, version)]
    checkpoint, exported = output / "lightning_logs" / version / "checkpoints" / "last.ckpt", tmp_path / "exported"
    assert main(["export", "--checkpoint", str(checkpoint), "--output", str(exported)]) == 0
    return rows, (exported / "model.safetensors").read_bytes()


@pytest.mark.more
def test_two_torchrun_agents_compute_what_one_command_does(folder: Path, fitted: tuple[Path, object], tmp_path: Path):
    run(two_agents, 2, folder, tmp_path / "agents")
    rows, weights = outcome(fitted[0], tmp_path)
    assert sum(bool(row["train/loss"]) for row in rows) > 3
    assert outcome(tmp_path / "agents", tmp_path) == (rows, weights)


@pytest.mark.slow
def test_four_ranks_by_each_launcher(folder: Path, tmp_path: Path):
    fold = {"trainer__strategy__init_args__fold": "tp2 | ep4"}
    seen = {}
    for launch in (one_command, two_agents, slurm):
        run(launch, 4, folder, tmp_path / launch.__name__, **fold)
        seen[launch] = outcome(tmp_path / launch.__name__, tmp_path)
    assert seen[two_agents] == seen[one_command]
    assert seen[slurm] == seen[one_command]

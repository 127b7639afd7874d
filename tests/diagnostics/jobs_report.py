# SPDX-License-Identifier: Apache-2.0
"""A script of runs in which one rank is lost in mid-step. Its arguments: a checkpoint, a folder, and names of :data:`CASES`.

Everything is imported once; each run's ranks are forked from here. What a rank says goes to ``FOLDER/case.rank``, and
exit statuses and seconds from the loss to the end of each rank to standard output, as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_moefold import MoECausalLM, MoEFoldStrategy, comm
from lightning_moefold.async_comm import Handle
from lightning_moefold.cli.terminal import quiet
from lightning_moefold.mesh import Axis
from lightning_moefold.modules.attention import head_groups
from lightning_moefold.parallel.pipeline.stage import Stage

#: The optimizer step in which it happens.
STEP = 2


@dataclass(frozen=True)
class Case:
    """A run.

    Args:
        fold: Of all its ranks.
        at: Module or class, and name, of the function whose second call in the step is the victim's last.
        axis: Only calls over this axis of the fold count.
        ranks: How many.
        victim: The rank that is lost.
        how: ``"killed"``, ``"raises"``, or what the victim does instead: ``"other collective"``, ``"other size"``,
            ``"stays away"``.
        timeout: Of the collectives, in seconds.
    """

    fold: str
    at: tuple[Any, str]
    axis: str = ""
    ranks: int = 2
    victim: int = 1
    how: str = "killed"
    timeout: int = 60


FSDP_GATHER = (dist, comm.ALL_GATHER)
CASES = {
    "tp": Case("tp2", (comm, "all_gather_raw"), "tp"),
    "cp": Case("cp2", (head_groups, "_Rotation"), "cp"),
    "ep": Case("| ep2", (Handle, "start"), "ep"),
    "etp": Case("| etp2", (comm, "all_gather_uneven"), "etp"),
    "pp": Case("pp2", (Stage, "forward")),
    "dp": Case("", FSDP_GATHER),
    "store": Case("| ep2", (Handle, "start"), "ep", victim=0),
    "four": Case("tp2 pp2 | ep2", (Handle, "start"), "ep", ranks=4, victim=3),
    "raises": Case("tp2 pp2 | ep2", (Handle, "start"), "ep", ranks=4, victim=3, how="raises"),
    "other collective": Case("tp2", (comm, "all_gather_raw"), "tp", how="other collective", timeout=10),
    "other size": Case("tp2", (comm, "all_gather_raw"), "tp", how="other size", timeout=10),
    "stays away": Case("tp2", (comm, "all_gather_raw"), "tp", how="stays away", timeout=10),
}


class Module(pl.LightningModule):
    """An ordinary user's, with the victim's end built in."""

    def __init__(self, checkpoint: str, case: Case, note: Path) -> None:
        super().__init__()
        self.checkpoint, self.case, self.note, self.calls = checkpoint, case, note, 0

    def configure_model(self) -> None:
        self.model = MoECausalLM.from_pretrained(self.checkpoint)

    def on_train_start(self) -> None:
        if self.global_rank == self.case.victim:
            place, name = self.case.at
            setattr(place, name, self.watched(getattr(place, name)))

    def watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            axes = [(a.axis if isinstance(a, Handle) else a).name for a in args if isinstance(a, (Axis, Handle))]
            self.calls += self.global_step == STEP and (not self.case.axis or self.case.axis in axes)
            if self.calls == 2:
                self.note.write_text(str(time.time()))
                args = self.end(args)
            return function(*args, **kwargs)

        return call

    def end(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        how = self.case.how
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)  # as the system does when memory is short
        elif how == "raises":
            raise ZeroDivisionError("of the user's own")
        elif how == "stays away":
            time.sleep(2 * self.case.timeout)
        elif how == "other collective":
            dist.barrier()
        elif how == "other size":
            return args[0][1:], *args[1:]
        return args

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def run(case: Case, checkpoint: str, note: Path) -> None:
    ids = torch.arange(8)
    strategy = MoEFoldStrategy(
        fold=case.fold, num_microbatches=2, timeout=timedelta(seconds=case.timeout), context_parallel_exchange="ring"
    )
    trainer = pl.Trainer(
        strategy=strategy, accelerator="cpu", devices=case.ranks, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    rows = torch.utils.data.DataLoader([{"input_ids": ids, "labels": ids}] * 32, batch_size=2)
    trainer.fit(Module(checkpoint, case, note), rows)


def start(name: str, checkpoint: str, folder: Path) -> list[int]:
    """Forks the ranks of a case; returns their ids."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    case, children = CASES[name], []
    for rank in range(case.ranks):
        child = os.fork()
        if child:
            children.append(child)
            continue
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(case.ranks), "GROUP_RANK": "0",
            "LOCAL_WORLD_SIZE": str(case.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "lost",
        }  # fmt: skip
        os.dup2(os.open(folder / f"{name}.{rank}", os.O_WRONLY | os.O_CREAT), 2)
        run(case, checkpoint, folder / f"{name}.time")
        sys.exit(0)
    return children


def wait(children: list[int], deadline: float) -> list[tuple[int | None, float]]:
    """Exit status (None: still running, then ended from here) and time of the end of each."""
    found: dict[int, tuple[int | None, float]] = {}
    while len(found) < len(children) and time.monotonic() < deadline:
        for child in children:
            if child not in found and (status := os.waitpid(child, os.WNOHANG))[0]:
                found[child] = os.waitstatus_to_exitcode(status[1]), time.time()
        time.sleep(0.02)
    for child in set(children) - set(found):
        os.kill(child, signal.SIGKILL)
        found[child] = None, time.time()
    return [found[child] for child in children]


if __name__ == "__main__":
    quiet()
    checkpoint, folder, *names = sys.argv[1:]
    results = {}
    for name in names:
        ended = wait(start(name, checkpoint, Path(folder)), time.monotonic() + 120)
        lost = float((Path(folder) / f"{name}.time").read_text())
        results[name] = [(status, at - lost) for status, at in ended]
    print(json.dumps(results))

# SPDX-License-Identifier: Apache-2.0
"""Runs an analysis in this process, on CPU ranks of this machine, or on the ranks that a launcher has started."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from lightning_moefold.compression.stream import Computing
from lightning_moefold.errors import InputError
from lightning_moefold.fold import Fold
from lightning_moefold.mesh import FoldedMesh
from lightning_moefold.testing.pool import RankError, RankPool

T = TypeVar("T")

_HOURS = 7 * 24 * 3600.0


def run_on_ranks(work: Callable[..., T], fold: str, ranks: int, dtype: torch.dtype, batch_size: int) -> tuple[T, bool]:
    """Runs the work under a fold with a progress bar.

    Under torchrun the ranks are those that it has started, on their GPUs if there are any. Otherwise one rank is this process,
    on a GPU if there is one, and several are CPU processes of this machine.

    Args:
        work: A function at the top level of a module, or a partial of one, of ``computing`` (:class:`~.stream.Computing`) and
            ``progress`` (:data:`~.analysis.Progress`).
        fold: Text of the fold, such as ``"tp2 | ep4"``.
        ranks: Number of ranks.
        dtype: Of weights and hidden states.
        batch_size: Rows of a forward pass.

    Returns:
        The result of the first rank, and whether this process is the one that writes.

    Raises:
        FoldError: If the fold is not one of these ranks.
        InputError: If something that the user gave cannot be used; of the rank that found it.
        RankError: If a rank failed for another reason.
    """
    if batch_size < 1 or ranks < 1:
        raise InputError(f"--ranks {ranks} and --batch-size {batch_size} must be at least 1.")
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "LOCAL_RANK" in os.environ
    if launched:
        return _on_launched_ranks(work, fold, dtype, batch_size)
    Fold.parse(fold, ranks)
    with _Bar() as bar:
        if ranks == 1:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            return work(computing=Computing(None, dtype, device, batch_size), progress=bar.show), True
        with tempfile.TemporaryDirectory() as folder, RankPool(ranks) as pool, bar.watching(Path(folder) / "done"):
            file = str(Path(folder) / "done")
            try:
                found = pool.run(_on_pool_rank, work, fold, dtype, batch_size, file, ranks=ranks, timeout=_HOURS)
            except RankError as failed:
                raise failed.for_user() from failed
            return found[0], True


def _on_pool_rank(work: Callable[..., T], fold: str, dtype: torch.dtype, batch_size: int, file: str) -> T | None:
    mesh = FoldedMesh(Fold.parse(fold, dist.get_world_size()), "cpu", replicated=True)

    def tell(done: int, total: int) -> None:
        if mesh.rank == 0:
            draft = Path(file).with_suffix(".tmp")
            draft.write_text(f"{done} {total}")
            draft.replace(file)

    result = work(computing=Computing(mesh, dtype, torch.device("cpu"), batch_size), progress=tell)
    return result if mesh.rank == 0 else None


def _on_launched_ranks(work: Callable[..., T], fold: str, dtype: torch.dtype, batch_size: int) -> tuple[T, bool]:
    local, here = int(os.environ["LOCAL_RANK"]), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    on_gpu = torch.cuda.device_count() >= here
    if torch.cuda.is_available() and not on_gpu and local == 0:
        print(f"{here} ranks share {torch.cuda.device_count()} GPU(s), so all compute on the CPU.", file=sys.stderr)
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    try:
        mesh = FoldedMesh(Fold.parse(fold, dist.get_world_size()), device.type, replicated=True)
        with _Bar(quiet=mesh.rank > 0) as bar:
            return work(computing=Computing(mesh, dtype, device, batch_size), progress=bar.show), mesh.rank == 0
    finally:
        dist.destroy_process_group()


class _Bar:
    """Shows layers done: a line that is written again in a terminal, nothing elsewhere.

    Args:
        quiet: Whether to show nothing.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet or not sys.stderr.isatty()

    def show(self, done: int, total: int) -> None:
        """Shows that ``done`` of ``total`` layers are done."""
        if not self._quiet:
            filled = 30 * done // total
            print(f"\r{'#' * filled}{'.' * (30 - filled)} layer {done}/{total}", end="", file=sys.stderr, flush=True)

    @contextmanager
    def watching(self, file: Path) -> Iterator[None]:
        """Shows what ranks write into a file."""
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(0.5):
                if file.is_file():
                    done, total = map(int, file.read_text().split())
                    self.show(done, total)

        thread = threading.Thread(target=watch, daemon=True)
        if not self._quiet:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            if thread.is_alive():
                thread.join()

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *exc: object) -> None:
        if not self._quiet:
            print(file=sys.stderr)

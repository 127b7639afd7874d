# SPDX-License-Identifier: Apache-2.0
"""What a rank says when all of them stop."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from lightning_moefold.comm import PeerError
from lightning_moefold.sentences import lost_contact, print_without_traceback
from lightning_moefold.testing import make_checkpoint

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("error", "first"),
    [
        (RuntimeError("[pair.cc:547] Connection closed by peer [127.0.0.1]:1.\nA hint\n"),
         "[pair.cc:547] Connection closed by peer [127.0.0.1]:1"),
        (RuntimeError("[rank 0] in read: Connection reset by peer GLHF!"), "[rank 0] in read: Connection reset by peer GLHF!"),
        (RuntimeError("Timed out waiting 1800000ms for recv operation to complete"),
         "Timed out waiting 1800000ms for recv operation to complete"),
        (dist.DistBackendError("NCCL error\nncclRemoteError: ... remote process exited or there was a network error."),
         "NCCL error"),
        (dist.DistBackendError("Watchdog caught collective operation timeout: WorkNCCL(...)"),
         "Watchdog caught collective operation timeout: WorkNCCL(...)"),
    ],
)  # fmt: skip
def test_lost_contact(error: Exception, first: str) -> None:
    assert lost_contact(error) == f"lost contact with another rank ({first}); the rank that ended first says why."
    with pytest.raises(type(error)) as caught:
        raise error
    assert f"another rank at {Path(__file__).name}:" in str(lost_contact(caught.value))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA out of memory"),
        ValueError("Connection closed by peer"),
        ConnectionResetError("Connection reset by peer"),  # of the user's own sockets
        PeerError("rank 1: RuntimeError: Connection closed by peer"),
    ],
)
def test_other_errors_are_told_as_they_are(error: Exception) -> None:
    assert lost_contact(error) is None


def test_one_line_for_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "excepthook", lambda *_: print("a traceback", file=sys.stderr))
    error, other = RuntimeError("Connection closed by peer"), RuntimeError("Connection closed by peer")
    print_without_traceback(error, 0)
    sys.excepthook(RuntimeError, error, None)
    assert capsys.readouterr().err == f"[rank 0] {lost_contact(error)}\n"
    sys.excepthook(RuntimeError, other, None)
    assert capsys.readouterr().err == "a traceback\n"


def test_a_killed_rank(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "qwen", "qwen3_moe", num_hidden_layers=1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.strategy.lost", str(checkpoint)],
            cwd=ROOT, stderr=subprocess.PIPE, text=True,
            env=os.environ | {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "lost",
                "OMP_NUM_THREADS": "1",
            },
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=120)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [1, -9]
    [line] = said[0].splitlines()
    assert line.startswith("[rank 0] lost contact with another rank at lost.py:")
    assert line.endswith("the rank that ended first says why.")

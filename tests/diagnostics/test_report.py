# SPDX-License-Identifier: Apache-2.0
"""What a rank says when all of them stop."""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from lightning_moefold.diagnostics.report import lost_contact, print_without_traceback
from lightning_moefold.errors import PeerError
from lightning_moefold.testing import make_checkpoint
from tests.diagnostics.jobs_report import CASES

ROOT = Path(__file__).resolve().parents[2]


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


class _Model:
    """Stands for what the frames of a failed run hold."""


def _fail() -> weakref.ref[_Model]:
    model = _Model()
    reference = weakref.ref(model)
    try:
        raise PeerError("rank 1 failed")
    except PeerError as error:
        print_without_traceback(error, 0)
    return reference


def test_a_failure_that_was_handled_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the model, by the frames of the error's traceback, nor a hook of ours."""
    before = mock.Mock()
    monkeypatch.setattr(sys, "excepthook", before)
    for _ in range(2):
        model = _fail()
        gc.collect()
        assert model() is None
        assert sys.excepthook is before


def test_two_errors_share_a_hook(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    before = mock.Mock()
    monkeypatch.setattr(sys, "excepthook", before)
    first, second = PeerError("one"), PeerError("two")
    print_without_traceback(first, 0)
    print_without_traceback(second, 0)
    del first
    sys.excepthook(PeerError, second, None)
    assert capsys.readouterr().err == "[rank 0] PeerError: two\n"
    del second
    gc.collect()
    assert sys.excepthook is before


def test_causes_in_a_pipeline_stage(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "excepthook", lambda *_: print("a traceback", file=sys.stderr))
    for cause, said in (
        (RuntimeError("Connection closed by peer [1]:2"), "lost contact with another rank"),
        (ZeroDivisionError("mine"), "a traceback"),
    ):
        with pytest.raises(RuntimeError) as caught:
            raise RuntimeError("[Stage 1] failed to run forward:\n...") from cause
        print_without_traceback(caught.value, 1)
        sys.excepthook(RuntimeError, caught.value, None)
        assert said in capsys.readouterr().err


# ---- ranks that are lost in mid-step: see jobs_report.py --------------------------------------------------------------

LOST = {
    "tp": {0: r"in the all-gather of \S+ over tp \[0, 1\] on stage 0 .*; rank 1 \(stage 0\) has ended\."},
    "cp": {0: r"in the exchange of \S+ over cp \[0, 1\] on stage 0 .*; rank 1 \(stage 0\) has ended\."},
    "ep": {0: r"in the all-to-all of [\w.]+ over ep \[0, 1\] on stage 0 .*; rank 1 \(stage 0\) has ended\."},
    "etp": {0: r"in the (?:all-gather|all-to-all) of \S+ over etp \[0, 1\] on stage 0 .*; rank 1 \(stage 0\) has ended\."},
    "pp": {0: r"in the exchange of pipeline stages over pp \[0, 1\] on stage 0 .*; rank 1 \(stage 1\) has ended\."},
    "dp": {0: r"in the all-gather of weights of \S+ over dp_cp \[0, 1\] on stage 0 .*; rank 1 \(stage 0\) has ended\."},
    "store": {1: r"in the all-to-all of \S+ over ep \[0, 1\] on stage 0 .*; rank 0 \(stage 0\), which holds the store of the "
                 r"process group, has ended\."},
    "four": {
        0: r"in the exchange of pipeline stages over pp \[0, 2\] on stage 0 .*; rank 2 \(stage 1\) said: lost contact in the "
           r"all-to-all of \S+ over ep \[2, 3\] on stage 1; rank 3 \(stage 1\) has ended\.",
        1: r"in the exchange of pipeline stages over pp \[1, 3\] on stage 0 .*; rank 3 \(stage 1\) has ended\.",
        2: r"in the all-to-all of \S+ over ep \[2, 3\] on stage 1 .*; rank 3 \(stage 1\) has ended\.",
    },
    "raises": {
        0: r"in the exchange of pipeline stages over pp \[0, 2\] on stage 0 .*; rank 2 \(stage 1\) said: lost contact in the "
           r"all-to-all of \S+ over ep \[2, 3\] on stage 1; rank 3 \(stage 1\) said: ZeroDivisionError: of the user's own\.",
        1: r"in the exchange of pipeline stages over pp \[1, 3\] on stage 0 .*; rank 3 \(stage 1\) said: ZeroDivisionError: .*",
        2: r"in the all-to-all of \S+ over ep \[2, 3\] on stage 1 .*; rank 3 \(stage 1\) said: ZeroDivisionError: .*",
    },
    "other collective": {
        0: r"in the all-gather of \S+ over tp \[0, 1\] on stage 0 \(Timed out .*\); no other rank of the group has ended, .*",
        1: r"in the barrier over world \[0, 1\] on stage 0 \(Timed out .*\); .*",
    },
    # Where gloo receives too much, it ends the process itself, and says so.
    "other size": {0: r"in the \S+ of \S+ over tp \[0, 1\] on stage 0 .*; rank 1 \(stage 0\) has ended\."},
    "stays away": {
        0: r"in the all-gather of \S+ over tp \[0, 1\] on stage 0 \(Timed out .*\); no other rank of the group has ended, .*",
    },
}  # fmt: skip
QUICK = ("four",)


def lose(names: Sequence[str], folder: Path) -> None:
    """Loses a rank in each of these runs; every survivor must end in time, and say what is expected."""
    checkpoint = make_checkpoint(folder / "mixtral", "mixtral", num_hidden_layers=2)
    command = [sys.executable, "-m", "tests.diagnostics.jobs_report", str(checkpoint), str(folder), *names]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == set(names)
    for name, ends in found.items():
        case = CASES[name]
        statuses = [status for status, _ in ends]
        killed = {"killed": -9, "other size": -6}.get(case.how, 1)
        assert statuses == [killed if rank == case.victim else 1 for rank in range(case.ranks)], name
        # A killed rank is noticed at once; the rest is the end of a Python process on a busy machine.
        assert max(seconds for _, seconds in ends) < 60, name
        for rank, expected in LOST[name].items():
            [line] = (folder / f"{name}.{rank}").read_text().splitlines()
            said = rf"\[rank {rank}\] lost contact with another rank at jobs_report\.py:\d+ {expected}"
            assert re.fullmatch(said, line), f"{name}: {line}"


@pytest.mark.more
def test_a_lost_rank(tmp_path: Path) -> None:
    lose(QUICK, tmp_path)


@pytest.mark.slow
def test_a_lost_rank_of_every_kind(tmp_path: Path) -> None:
    assert set(LOST) == set(CASES)
    lose([name for name in CASES if name not in QUICK], tmp_path)

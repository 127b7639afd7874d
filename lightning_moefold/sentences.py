# SPDX-License-Identifier: Apache-2.0
"""What a user reads when all ranks stop: one traceback, and one line from each other rank."""

from __future__ import annotations

import re
import sys
import sysconfig
import traceback
from pathlib import Path
from types import TracebackType

from lightning_moefold.checkpoint import CheckpointError
from lightning_moefold.comm import PeerError
from lightning_moefold.fold import FoldError
from lightning_moefold.refusals import UnsupportedFeature

#: Errors whose message says everything and that every rank raises for the same reason.
_SENTENCES = (UnsupportedFeature, FoldError, CheckpointError)
#: What gloo and NCCL say on ranks whose peer has ended or does not answer.
_LOST = re.compile(
    "Connection closed by peer|Connection reset by peer|Timed out waiting|remote process exited|"
    "Watchdog caught collective operation timeout"
)


def lost_contact(error: BaseException) -> str | None:
    """A sentence for an error that says no more than that another rank is gone or does not answer; None for any other.

    It names the line of the user's code that waited, without which a rank that hangs would be hard to find.
    """
    if isinstance(error, PeerError) or not isinstance(error, RuntimeError) or not _LOST.search(str(error)):
        return None
    first = str(error).strip().splitlines()[0].rstrip(". ")
    return f"lost contact with another rank{_waited(error)} ({first}); the rank that ended first says why."


def _waited(error: BaseException) -> str:
    """The innermost line that lies neither in Python's library or an installed package nor in ours."""
    libraries = (Path(__file__).parent, Path(sysconfig.get_path("stdlib")))
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_file() and "site-packages" not in path.parts and not any(map(path.is_relative_to, libraries)):
            return f" at {path.name}:{frame.lineno}"
    return ""


def print_without_traceback(error: BaseException, rank: int) -> None:
    """Has ``error`` printed as one line if it ends this process, where its traceback tells nothing more.

    That is on ranks that only quote the one that failed, on ranks other than 0 for what all refuse alike, and on ranks
    that have lost contact with another. A rank that failed by itself keeps its traceback, and so do all other errors.

    Args:
        error: On its way out of the Trainer.
        rank: This rank.
    """
    sentence = lost_contact(error)
    if sentence is None:
        if not isinstance(error, PeerError) and (rank == 0 or not isinstance(error, _SENTENCES)):
            return
        sentence = f"{type(error).__name__}: {error}"
    before = sys.excepthook

    def hook(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
        if value is error:
            print(f"[rank {rank}] {sentence}", file=sys.stderr)
        else:
            before(kind, value, trace)

    sys.excepthook = hook

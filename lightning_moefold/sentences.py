# SPDX-License-Identifier: Apache-2.0
"""What a user reads when all ranks stop: one traceback, and one line from each other rank."""

from __future__ import annotations

import sys
from types import TracebackType

from lightning_moefold.checkpoint import CheckpointError
from lightning_moefold.comm import PeerError
from lightning_moefold.fold import FoldError
from lightning_moefold.refusals import UnsupportedFeature

#: Errors whose message says everything and that every rank raises for the same reason.
_SENTENCES = (UnsupportedFeature, FoldError, CheckpointError)


def print_without_traceback(error: BaseException, rank: int) -> None:
    """Has ``error`` printed as one line if it ends this process, where its traceback tells nothing more.

    That is on ranks that only quote the one that failed, and on ranks other than 0 for what all refuse alike. A rank that
    failed by itself keeps its traceback, and so do all errors that are not ours.

    Args:
        error: On its way out of the Trainer.
        rank: This rank.
    """
    if not isinstance(error, PeerError) and (rank == 0 or not isinstance(error, _SENTENCES)):
        return
    before = sys.excepthook

    def hook(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
        if value is error:
            print(f"[rank {rank}] {kind.__name__}: {value}", file=sys.stderr)
        else:
            before(kind, value, trace)

    sys.excepthook = hook

# SPDX-License-Identifier: Apache-2.0
"""Error reports when all ranks stop: one traceback, and one line from each other rank."""

from __future__ import annotations

import os
import re
import sys
import sysconfig
import traceback
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from lightning_moefold.diagnostics.collective import Collective, find_collective
from lightning_moefold.diagnostics.liveness import Report, RollCall
from lightning_moefold.errors import (
    CheckpointError,
    FoldError,
    NonFiniteError,
    PeerError,
    ReplicaError,
    UnsupportedFeature,
)
from lightning_moefold.mesh import FoldedMesh
from lightning_moefold.parallel import PipelinePlan

#: Errors with a complete message, which every rank raises for the same reason.
_SENTENCES = (UnsupportedFeature, FoldError, CheckpointError, NonFiniteError, ReplicaError)
#: Messages of gloo and NCCL on ranks whose peer has ended or does not answer.
_LOST = re.compile(
    "Connection closed by peer|Connection reset by peer|Broken pipe|Timed out waiting|remote process exited|"
    "Watchdog caught collective operation timeout"
)
#: The source position in gloo's messages, and its advice to look elsewhere.
_BEFORE_AND_AFTER = re.compile(r"^\[/\S*\] | This is typically caused by.*")
#: Messages of torch about two ranks that call different collectives at the same time.
_MISMATCHED = re.compile("Detected mismatch between collectives|op.preamble.length <= op.nbytes|invalid tensor size")


@dataclass(frozen=True)
class Place:
    """The place of a rank in the run: its mesh, the plan that says who holds which stages, and what probes other ranks."""

    mesh: FoldedMesh
    plan: PipelinePlan = PipelinePlan()
    roll: RollCall | None = None

    def stage(self, rank: int) -> str:
        """Returns the stages of a rank as text: ``stage 1``, or ``stages 0 and 3``."""
        fold = self.mesh.fold
        stages = self.plan.local_stages(fold.pp, fold.coordinates(rank)["pp"]) if fold.pp > 1 else [0]
        return f"stage{'s' * (len(stages) > 1)} {' and '.join(map(str, stages))}"


def lost_contact(error: BaseException, place: Place | None = None) -> str | None:
    """Returns a sentence for an error that only says that another rank is gone or silent; None for other errors.

    The sentence names the line of the user's code that waited, which helps to find a hanging rank. With ``place`` it
    also names the stage, the collective, and the rank that is gone.
    """
    inner = _unwrapped(error)
    text = str(inner)
    if isinstance(inner, PeerError) or not isinstance(inner, RuntimeError):
        return None
    if not (_LOST.search(text) or (isinstance(inner, dist.DistBackendError) and _MISMATCHED.search(text))):
        return None
    first = _BEFORE_AND_AFTER.sub("", _first_line(inner)).rstrip(". ")
    collective = find_collective(inner, None if place is None else place.mesh)
    doing = "" if collective is None else f" in {collective}"
    if place is None:
        return f"lost contact with another rank{_waited(error)}{doing} ({first}); the rank that ended first says why."
    doing += f" on {place.stage(place.mesh.rank)}"
    if place.roll is not None:
        place.roll.publish(doing.strip(), "waits")
    who = _missing(place, collective)
    if place.roll is not None:
        place.roll.publish(f"lost contact{doing}; {who}")
    return f"lost contact with another rank{_waited(error)}{doing} ({first}); {who}"


def _unwrapped(error: BaseException) -> BaseException:
    """Returns the error that failed in a pipeline stage; torch wraps it in one that lists the stage's inputs."""
    while error.__cause__ is not None and "failed to run" in str(error):
        error = error.__cause__
    return error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")


def _missing(place: Place, collective: Collective | None) -> str:
    """Says which ranks are gone and why, as far as this is known."""
    if place.roll is None:
        return "the rank that ended first says why."
    ranks = place.mesh.world.ranks if collective is None or not collective.ranks else collective.ranks
    report = place.roll.probe(ranks)
    if report.store_lost:
        # torchrun's agent may hold it; otherwise the first rank does.
        with_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        holder = "the launcher" if with_agent else f"rank 0 ({place.stage(0)})"
        return f"{holder}, which holds the store of the process group, has ended."
    if report.explains:
        return _tell(place, report)
    waits = "".join(f"; rank {rank} ({place.stage(rank)}) waited {text}" for rank, text in report.waits[:2])
    return f"no other rank of the group has ended, so one of them does something else{waits}."


def _tell(place: Place, report: Report) -> str:
    """Lists the ranks that ended without last words, and then the last words of others."""
    speakers = {rank for rank, _ in report.words}
    gone = [(rank, "has ended") for rank in report.ended] + [(rank, "cannot be reached") for rank in report.silent]
    told = [(rank, f"said: {text.rstrip('.')}") for rank, text in report.words]
    parts = [part for part in gone if part[0] not in speakers][:8] + told[:2]
    return "; ".join(f"rank {rank} ({place.stage(rank)}) {text}" for rank, text in parts) + "."


def _waited(error: BaseException) -> str:
    """Returns the innermost line of the user's code: not in Python's library, an installed package or this package."""
    libraries = (Path(__file__).parents[1], Path(sysconfig.get_path("stdlib")))
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_file() and "site-packages" not in path.parts and not any(map(path.is_relative_to, libraries)):
            return f" at {path.name}:{frame.lineno}"
    return ""


def print_without_traceback(error: BaseException, rank: int, place: Place | None = None) -> None:
    """Prints ``error``, which leaves the Trainer, as one line if it ends this process and its traceback adds nothing.

    This applies to ranks that only quote another rank's error, to ranks other than 0 if all refuse the same thing, and
    to ranks that lost contact with another. All other errors keep their traceback, including that of the rank that
    failed.
    """
    sentence = lost_contact(error, place)
    if sentence is None:
        if place is not None and place.roll is not None:
            inner = _unwrapped(error)
            place.roll.publish(f"{type(inner).__name__}: {_first_line(inner)}")
        if not isinstance(error, PeerError) and (rank == 0 or not isinstance(error, _SENTENCES)):
            return
        sentence = f"{type(error).__name__}: {error}"
    if not isinstance(sys.excepthook, _PrintSentences):
        sys.excepthook = _PrintSentences(sys.excepthook)
    sys.excepthook.add(error, f"[rank {rank}] {sentence}")


class _Sentence:
    """A sentence that lives as long as the error that holds it as an attribute."""

    def __init__(self, text: str) -> None:
        self.text = text


class _PrintSentences:
    """An excepthook that prints registered errors as one sentence, and passes all others to the hook that it replaces.

    It holds no reference to errors, whose tracebacks would keep the model of a failed run alive. When the last
    registered error is gone, because the user has handled it, the other hook is restored.
    """

    def __init__(self, before: Callable[[type[BaseException], BaseException, TracebackType | None], Any]) -> None:
        self.before, self.errors = before, 0

    def add(self, error: BaseException, text: str) -> None:
        """Registers ``text`` to be printed instead of the traceback of ``error``."""
        sentence = _Sentence(text)
        error._moefold_sentence = sentence  # type: ignore[attr-defined]
        self.errors += 1
        weakref.finalize(sentence, self._leave).atexit = False

    def _leave(self) -> None:
        self.errors -= 1
        if not self.errors and sys.excepthook is self:
            sys.excepthook = self.before

    def __call__(self, kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
        """Called by Python for an uncaught error."""
        sentence = getattr(value, "_moefold_sentence", None)
        if isinstance(sentence, _Sentence):
            print(sentence.text, file=sys.stderr)
        else:
            self.before(kind, value, trace)

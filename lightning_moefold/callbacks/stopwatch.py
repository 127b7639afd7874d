# SPDX-License-Identifier: Apache-2.0
"""A stopwatch whose reading can be put off: on a GPU time is marked by events, which are read only at log time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import torch

Span: TypeAlias = tuple[Any, Any]
"""Marks of a start and an end."""


class Clock(Protocol):
    """Marks moments, and tells later how far they were apart."""

    def mark(self) -> Any:
        """This moment."""
        ...

    def seconds(self, spans: Sequence[Span]) -> float:
        """Total length of the spans in seconds; the last one ended last."""
        ...


class HostClock:
    """Wall-clock time of this process.

    Args:
        now: Gives the time in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now

    def mark(self) -> float:
        """This moment."""
        return self.now()

    def seconds(self, spans: Sequence[Span]) -> float:
        """See :class:`Clock`."""
        return float(sum(end - start for start, end in spans))


class CudaClock:
    """Time on a GPU's stream. Marking queues an event and waits for nothing; reading waits for the last event.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> torch.cuda.Event:
        """The moment at which the stream gets here."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, spans: Sequence[Span]) -> float:
        """See :class:`Clock`."""
        if not spans:
            return 0.0
        spans[-1][1].synchronize()
        return sum(start.elapsed_time(end) for start, end in spans) / 1e3


class Stopwatch:
    """Laps of running time; what passes while it is paused belongs to no lap.

    Args:
        clock: Where the time comes from.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._spans: list[Span] = []
        self._since: Any = None

    def resume(self) -> None:
        """Runs on, if paused."""
        if self._since is None:
            self._since = self.clock.mark()

    def pause(self) -> None:
        """Stops, if running."""
        if self._since is not None:
            self._spans.append((self._since, self.clock.mark()))
            self._since = None

    def skip(self) -> None:
        """Leaves out the time since the latest lap or resumption."""
        if self._since is not None:
            self._since = self.clock.mark()

    def lap(self) -> list[Span]:
        """Ends a lap and returns its spans; goes on running if it was."""
        if self._since is not None:
            now = self.clock.mark()
            self._spans.append((self._since, now))
            self._since = now
        spans, self._spans = self._spans, []
        return spans

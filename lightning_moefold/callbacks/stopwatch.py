# SPDX-License-Identifier: Apache-2.0
"""A stopwatch that can be read later: on a GPU, time is marked by events, which are read only at log time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

Span: TypeAlias = tuple[Any, Any]
"""Marks of a start and an end."""


class HostClock:
    """Wall-clock time of this process.

    Args:
        now: Function that returns the time in seconds.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now

    def mark(self) -> float:
        """This moment."""
        return self.now()

    def seconds(self, spans: Sequence[Span]) -> float:
        """Returns the total length of the spans in seconds."""
        return float(sum(end - start for start, end in spans))


class CudaClock:
    """Time on a GPU's stream. Marking queues an event without waiting; reading waits for the last event.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> torch.cuda.Event:
        """Marks the moment at which the stream reaches this point."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, spans: Sequence[Span]) -> float:
        """Returns the total length of the spans in seconds; the last span must be the one that ended last."""
        if not spans:
            return 0.0
        spans[-1][1].synchronize()
        return sum(start.elapsed_time(end) for start, end in spans) / 1e3


class Stopwatch:
    """Measures laps of running time; the time while it is paused belongs to no lap.

    Args:
        clock: The clock that marks moments.
    """

    def __init__(self, clock: HostClock | CudaClock) -> None:
        self.clock = clock
        self._spans: list[Span] = []
        self._since: Any = None

    def resume(self) -> None:
        """Continues if paused."""
        if self._since is None:
            self._since = self.clock.mark()

    def pause(self) -> None:
        """Pauses if running."""
        if self._since is not None:
            self._spans.append((self._since, self.clock.mark()))
            self._since = None

    def skip(self) -> None:
        """Leaves out the time since the latest lap or resumption."""
        if self._since is not None:
            self._since = self.clock.mark()

    def lap(self) -> list[Span]:
        """Ends a lap and returns its spans; the next lap starts at once if the stopwatch was running."""
        if self._since is not None:
            now = self.clock.mark()
            self._spans.append((self._since, now))
            self._since = now
        spans, self._spans = self._spans, []
        return spans

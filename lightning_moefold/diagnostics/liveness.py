# SPDX-License-Identifier: Apache-2.0
"""Finds out which ranks still run, and the errors of those that failed. Used only after a failure.

Each rank keeps a listening socket and publishes its address in the store of the process group. While the process lives,
its kernel completes every connection. After it has ended, in whatever way, new connections are refused and old ones are
reset. So ranks need no heartbeats: until a collective fails, nothing is sent and no thread runs.

Connections are never accepted, so each stays in the kernel's queue of the probed rank, and a full queue looks like a
machine that is down. Therefore a probing rank connects once to each peer and keeps the connection while it probes. It
probes the peers that follow it in the group, so that no rank is probed by all others.

A rank that fails with an error of its own publishes that error in the store (its last words) before it closes its
connections.
"""

from __future__ import annotations

import os
import socket
import time
import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist

State = Literal["running", "ended", "silent", "unknown"]

_PREFIX = "moefold/liveness"
#: Number of peers that a rank probes; the queue of a rank must hold a connection from each rank that may probe it.
_MOST_ASKED = 64
#: Length of a rank's queue of connections, if its kernel allows it; a rank can be probed over each axis of the fold.
_QUEUE = 16 * _MOST_ASKED
#: Waiting time for a rank whose connections close shortly before its process ends, and for words on their way.
_PATIENCE_SECONDS = 2.0
_ANSWER_SECONDS = 1.0


@dataclass(frozen=True)
class Report:
    """What is known about a group's ranks after a failure.

    Args:
        ended: Ranks whose process is gone.
        silent: Ranks that cannot be reached, for example because their machine is down.
        words: Errors that ranks published before they ended, by rank.
        waits: Collectives in which other ranks that have also lost contact waited, by rank.
        store_lost: Whether the store does not answer, because the process that holds it has ended.
    """

    ended: tuple[int, ...] = ()
    silent: tuple[int, ...] = ()
    words: tuple[tuple[int, str], ...] = ()
    waits: tuple[tuple[int, str], ...] = ()
    store_lost: bool = False

    @property
    def explains(self) -> bool:
        """Whether the report explains why contact was lost."""
        return bool(self.ended or self.silent or self.words or self.store_lost)


class RollCall:
    """One rank's socket, its texts in the store of the default process group, and its probes of other ranks."""

    def __init__(self, store: dist.Store, rank: int) -> None:
        self.store, self._rank = store, rank
        family, host = _reachable_address()
        self._socket = socket.create_server(("", 0), family=family, backlog=_QUEUE)
        self._socket.setblocking(False)
        self._address = f"{host} {self._socket.getsockname()[1]}"
        # A forked DataLoader worker would keep the socket of a dead rank open.
        os.register_at_fork(after_in_child=_closer(self._socket))

    def announce(self) -> None:
        """Makes this rank known, and forgets what it said and who asked in an earlier run."""
        with suppress(OSError):  # once the queue is empty
            while True:
                self._socket.accept()[0].close()
        self.store.set(f"{_PREFIX}/address/{self._rank}", self._address)
        for subject in ("words", "waits"):
            self.store.set(f"{_PREFIX}/{subject}/{self._rank}", "")

    def publish(self, text: str, subject: Literal["words", "waits"] = "words") -> None:
        """Publishes last words, or the collective in which this rank waited; no effect if the store is gone."""
        if self._store_answers():
            with suppress(RuntimeError):
                self.store.set(f"{_PREFIX}/{subject}/{self._rank}", text[:1000])

    def probe(self, ranks: Iterable[int]) -> Report:
        """Probes the 64 of a group's ranks that follow this one, and waits up to two seconds until one is found to be missing.

        The first rank follows the last one.
        """
        others = sorted((rank for rank in ranks if rank != self._rank), key=lambda rank: (rank < self._rank, rank))
        others = others[:_MOST_ASKED]
        until = time.monotonic() + _PATIENCE_SECONDS
        with ExitStack() as stack:
            connections: dict[int, socket.socket] = {}
            while True:
                try:
                    answers = self._store_answers()
                    report = self._ask_once(others, connections, stack) if answers else Report(store_lost=True)
                except RuntimeError:  # raised by the store
                    return Report(store_lost=True)
                if report.explains or time.monotonic() > until:
                    return report
                time.sleep(0.1)

    def _store_answers(self) -> bool:
        """Whether the store answers. Asked first, because torch logs a page per request to a store that is gone."""
        store = self.store
        while isinstance(store, dist.PrefixStore):
            store = store.underlying_store
        if not isinstance(store, dist.TCPStore):
            return True
        found = _try_to_connect(store.host, store.port)
        if isinstance(found, socket.socket):
            found.close()
        return isinstance(found, socket.socket)

    def _ask_once(self, ranks: list[int], connections: dict[int, socket.socket], stack: ExitStack) -> Report:
        words, waits = (
            tuple((rank, text) for rank in ranks if (text := self._read(f"{subject}/{rank}")))
            for subject in ("words", "waits")
        )
        states = {rank: self._state(rank, connections, stack) for rank in ranks}
        ended = tuple(rank for rank, state in states.items() if state == "ended")
        return Report(ended, tuple(rank for rank, state in states.items() if state == "silent"), words, waits)

    def _read(self, key: str) -> str:
        key = f"{_PREFIX}/{key}"
        return self.store.get(key).decode() if self.store.check([key]) else ""

    def _state(self, rank: int, connections: dict[int, socket.socket], stack: ExitStack) -> State:
        """Connects to ``rank`` in the first call and stores the connection; later calls check whether it still stands."""
        if rank in connections:
            return _state_of(connections[rank])
        host, _, port = self._read(f"address/{rank}").partition(" ")
        if not port:
            return "unknown"
        found = _try_to_connect(host, int(port))
        if not isinstance(found, socket.socket):
            return found
        connections[rank] = stack.enter_context(found)
        return "running"


def _try_to_connect(host: str, port: int) -> socket.socket | Literal["ended", "silent"]:
    """Returns a non-blocking connection, or the reason why there is none."""
    try:
        found = socket.create_connection((host, port), timeout=_ANSWER_SECONDS)
    except ConnectionRefusedError:
        return "ended"
    except OSError:
        return "silent"
    found.setblocking(False)
    return found


def _state_of(connection: socket.socket) -> State:
    """Returns the state of a process: a live one does not touch the connection; after its end the kernel resets it."""
    try:
        connection.recv(1)
    except BlockingIOError:
        return "running"
    except OSError:
        pass
    return "ended"


def _closer(listening: socket.socket) -> Callable[[], None]:
    """Returns a function that closes the socket if it still exists; fork hooks are permanent and must not keep it alive."""
    reference = weakref.ref(listening)

    def close() -> None:
        if (found := reference()) is not None:
            found.close()

    return close


def _reachable_address() -> tuple[socket.AddressFamily, str]:
    """Returns this machine's address as seen by others: that of the route to the master. Nothing is sent."""
    try:
        master = os.environ.get("MASTER_ADDR", "localhost")
        family, kind, _, _, address = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return family, probe.getsockname()[0]
    except OSError:
        return socket.AF_INET, socket.gethostname()

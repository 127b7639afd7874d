# SPDX-License-Identifier: Apache-2.0
"""Ranks that live are never taken for lost, however many ask; a rank that ends while it is asked is noticed."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from lightning_moefold.diagnostics import liveness
from lightning_moefold.diagnostics.liveness import RollCall

LISTENS = """
import socket, sys
listening = socket.create_server(("127.0.0.1", 0))
print(listening.getsockname()[1], flush=True)
sys.stdin.read()
"""


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dist.Store:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(liveness, "_PATIENCE_SECONDS", 0.5)
    return dist.HashStore()


@pytest.fixture
def other(store: dist.Store) -> Iterator[subprocess.Popen[str]]:
    """The process of rank 1, which never looks at its socket."""
    command = [sys.executable, "-S", "-c", LISTENS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        store.set("moefold/liveness/address/1", f"127.0.0.1 {process.stdout.readline().strip()}")
        yield process
        process.kill()


def pending(roll: RollCall) -> int:
    """How many connections wait in the queue of a rank."""
    count = 0
    roll._socket.setblocking(False)
    while True:
        try:
            roll._socket.accept()[0].close()
        except BlockingIOError:
            return count
        count += 1


def test_a_rank_is_asked_by_one_connection(store: dist.Store) -> None:
    """Each stays in its queue of limited length: a new one every tenth of a second made living ranks look lost."""
    asked, asks = RollCall(store, 0), RollCall(store, 1)
    for roll in (asked, asks):
        roll.announce()
    assert not asks.probe(range(2)).explains
    assert pending(asked) == 1
    assert not asks.probe(range(2)).explains
    asked.announce()  # of the next run, which begins with an empty queue
    assert pending(asked) == 0


def test_ranks_of_a_large_group_do_not_all_ask_the_same(store: dist.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []

    def note(self: RollCall, ranks: list[int], *_: object) -> liveness.Report:
        asked.append(ranks)
        return liveness.Report(ended=(0,))

    monkeypatch.setattr(RollCall, "_ask_once", note)
    for rank in range(0, 1000, 50):
        RollCall(store, rank).probe(range(1000))
    assert all(len(ranks) == 64 for ranks in asked)
    assert asked[2] == list(range(101, 165))
    assert asked[-1] == [*range(951, 1000), *range(15)]
    times_asked = [sum(rank in ranks for ranks in asked) for rank in range(1000)]
    assert max(times_asked) == 2


def test_a_rank_that_ends_while_it_is_asked(store: dist.Store, other: subprocess.Popen[str]) -> None:
    roll = RollCall(store, 0)
    assert roll.probe([0, 1]) == liveness.Report()
    timer = threading.Timer(0.2, other.kill)
    timer.start()
    assert roll.probe([0, 1]).ended == (1,)
    timer.join()
    other.wait()
    assert roll.probe([0, 1]).ended == (1,)


def test_what_a_rank_said_is_told(store: dist.Store) -> None:
    speaks, asks = RollCall(store, 0), RollCall(store, 1)
    speaks.announce()
    speaks.publish("ZeroDivisionError: mine")
    assert asks.probe([0, 1]).words == ((0, "ZeroDivisionError: mine"),)
    speaks.announce()
    assert asks.probe([0, 1]).words == ()

# SPDX-License-Identifier: Apache-2.0
"""Ranks as threads of one process, for layers: what they send each other is handed over in memory.

Starting a process for a rank takes seconds, a thread nothing. Only the two collectives of ``alltoall`` are here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_moefold import comm
from lightning_moefold.dispatch import ExpertAxes
from lightning_moefold.mesh import Axis

T = TypeVar("T")


class _Done:
    def wait(self) -> None:
        pass


class _Group:
    """Every rank writes down what it sends; when all have, each reads what is for it."""

    def __init__(self, size: int) -> None:
        self._barrier, self._sent = threading.Barrier(size, timeout=60), [None] * size

    def abort(self) -> None:
        self._barrier.abort()

    def exchange(self, rank: int, sent: Any) -> list[Any]:
        self._sent[rank] = sent
        self._barrier.wait()
        found = list(self._sent)
        self._barrier.wait()
        return found


def run(function: Callable[[ExpertAxes], T], size: int) -> list[T]:
    """``function`` on each of ``size`` ranks of ep, and what they return."""
    group, place = _Group(size), threading.local()

    def all_to_all(
        out: Tensor, x: Tensor, receive: list[int], send: list[int], group: _Group, async_op: bool = False
    ) -> Any:
        parts = group.exchange(place.rank, x.detach().split(send))
        out.copy_(torch.cat([part[place.rank] for part in parts]))
        assert [len(part[place.rank]) for part in parts] == list(receive)
        return _Done() if async_op else None

    def all_gather(out: Tensor, x: Tensor, group: _Group) -> None:
        out.copy_(torch.cat(group.exchange(place.rank, x)))

    def on(rank: int) -> T:
        place.rank = rank
        torch.set_default_dtype(torch.float64)
        axis = Axis("ep", tuple(range(size)), rank, group)  # type: ignore[arg-type]
        try:
            return function(ExpertAxes(axis, etp_ep=axis))
        except BaseException:
            group.abort()
            raise

    with (
        mock.patch.object(dist, "all_to_all_single", all_to_all),
        mock.patch.object(dist, comm.ALL_GATHER, all_gather),
        ThreadPoolExecutor(size) as threads,
    ):
        tasks = [threads.submit(on, rank) for rank in range(size)]
        errors = [error for task in tasks if (error := task.exception()) is not None]
        if errors:
            raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
        return [task.result() for task in tasks]

# SPDX-License-Identifier: Apache-2.0
"""What a pipeline sends and receives gets through on NCCL, where a rank's messages of a group form one queue.

The real engine runs as one rank after the other on a process group that does nothing. What it asks for is recorded, and then
all ranks' queues are played together: a message passes when it is at the head of both its queues (no buffer helps it, as none
helps a large one), and so does the next.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_moefold import Fold
from lightning_moefold.mesh import FoldedMesh, forget_groups
from lightning_moefold.parallel.pipeline.engine import ScheduleRunner, Wire
from lightning_moefold.parallel.pipeline.plan import PipelinePlan

PLANS = [
    PipelinePlan("gpipe"), PipelinePlan("1f1b"), PipelinePlan("interleaved_1f1b", 2), PipelinePlan("interleaved_1f1b", 3),
    PipelinePlan("interleaved_zero_bubble", 2), PipelinePlan("zbv"), PipelinePlan("dualpipev"),
]  # fmt: skip
WIRES = (Wire((2, 3), torch.float32), Wire((4,), torch.float64))

#: Direction, peer, elements. A queue's entries are single messages, or several that go together.
Message = tuple[str, int, int]
Queue = list[list[Message]]


class _Stage(nn.Module):
    """Of a pipeline that only counts."""

    def __init__(self, index: int, count: int) -> None:
        super().__init__()
        self.index, self.is_first, self.is_last = index, index == 0, index == count - 1
        self.call: Any = None
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, *received: Tensor, microbatch: Tensor) -> Any:
        assert len(received) == (0 if self.is_first else len(WIRES))
        values = received or tuple(torch.ones(w.shape, dtype=w.dtype) for w in WIRES)
        outputs = tuple(x * self.scale.to(x.dtype) for x in values)
        return torch.stack([x.double().sum() for x in outputs]).sum() if self.is_last else outputs


@contextmanager
def recorded(queue: Queue) -> Iterator[None]:
    """Inside, nothing travels; ``queue`` has what was asked for."""

    def note(kind: str) -> Any:
        def call(tensor: Tensor, peer: int | None = None, group: Any = None, tag: int = 0, **names: int) -> Any:
            other = peer if peer is not None else names.get("dst", names.get("src"))
            if other is None:
                other = dist.get_global_rank(group, names["group_dst" if kind == "send" else "group_src"])
            queue.append([(kind, other, tensor.numel())])
            if kind == "receive":
                tensor.detach().fill_(1)
            return SimpleNamespace(wait=lambda: None)

        return call

    isend, irecv = note("send"), note("receive")

    def batch(operations: list[Any]) -> list[Any]:
        start = len(queue)
        works = [o.op(o.tensor, o.peer, o.group) for o in operations]
        queue[start:] = [[message for entry in queue[start:] for message in entry]]
        return works

    c10d = dist.distributed_c10d
    names = {"isend": isend, "send": isend, "irecv": irecv, "recv": irecv, "batch_isend_irecv": batch}
    with mock.patch.multiple(dist, **names), mock.patch.multiple(c10d, **names):
        yield


def queue_of(plan: PipelinePlan, pp: int, rank: int, microbatches: int, training: bool) -> Queue:
    """What ``rank`` asks for in one pass."""
    dist.init_process_group("fake", rank=rank, world_size=pp, store=FakeStore())
    try:
        mesh = FoldedMesh(Fold(pp, pipeline_parallel_size=pp), "cpu")
        stages = [_Stage(index, pp * plan.chunks) for index in plan.local_stages(pp, rank)]
        runner = ScheduleRunner(nn.ModuleList(stages), mesh, plan, stages)
        queue: Queue = []
        with recorded(queue):
            run = runner.train if training else runner.evaluate
            run("call", microbatches, WIRES, torch.device("cpu"))
        return queue
    finally:
        forget_groups()
        dist.destroy_process_group()


def play(queues: list[Queue]) -> dict[int, list[Message]]:
    """Plays all ranks' queues; what each of them is left waiting for, nothing if all get through."""
    queues = [list(queue) for queue in queues]
    heads = [Counter(queue[0]) if queue else Counter() for queue in queues]
    moved = True
    while moved:
        moved = False
        for rank, head in enumerate(heads):
            for kind, peer, size in list(head):
                answer = ("receive" if kind == "send" else "send", rank, size)
                if heads[peer][answer] and head[kind, peer, size]:
                    head[kind, peer, size] -= 1
                    heads[peer][answer] -= 1
                    moved = True
        for rank, queue in enumerate(queues):
            if queue and not +heads[rank]:
                queue.pop(0)
                heads[rank] = Counter(queue[0]) if queue else Counter()
                moved = True
    return {rank: list(+head) for rank, head in enumerate(heads) if queues[rank]}


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan.schedule}-{plan.chunks}")
def test_all_messages_get_through(plan: PipelinePlan) -> None:
    tried = 0
    for pp in (2, 3, 4):
        for microbatches in range(1, 7):
            ways = [False]
            try:
                plan.check(pp, microbatches, "optimizer")
                ways.append(True)
            except ValueError:
                pass  # too few to train with; evaluation takes any number
            for training in ways:
                queues = [queue_of(plan, pp, rank, microbatches, training) for rank in range(pp)]
                assert all(queues), "every rank sends or receives"
                assert play(queues) == {}, f"pp={pp}, {microbatches} micro-batches, training={training}"
                tried += 1
    assert tried > 18


def test_a_queue_that_does_not_get_through() -> None:
    """The play finds the two that wait for each other, and lets pass what goes together."""
    both = [[("send", 1, 4)], [("receive", 1, 4)]], [[("send", 0, 4)], [("receive", 0, 4)]]
    assert play(list(both)) == {0: [("send", 1, 4)], 1: [("send", 0, 4)]}
    together: list[Queue] = [[[m for entry in queue for m in entry]] for queue in both]
    assert play(together) == {}

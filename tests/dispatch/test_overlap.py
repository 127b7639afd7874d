# SPDX-License-Identifier: Apache-2.0
"""Tokens and their gradients travel while the rank computes something else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from lightning_moefold.async_comm import Handle
from lightning_moefold.testing import RankPool
from tests.dispatch import jobs_overlap

FORWARD = ["start", "in", "in", "wait", "experts", "start", "out", "wait"]
BACKWARD = ["start", "out'", "wait", "experts'", "start", "in'", "in'", "wait"]


@pytest.mark.parametrize(
    ("fold", "fields"),
    [
        ("ep2", {}),
        ("ep2", {"capacity_factor": 1.0, "pad_to_capacity": True}),
        ("ep2", {"dispatcher": "deduplicated"}),
        ("ep2", {"dispatcher": "allgather"}),
        ("etp2", {"dispatcher": "allgather"}),
        ("tp2 | ep2", {}),
    ],
)
def test_the_shared_expert_computes_beside_both_exchanges(pool: RankPool, fold: str, fields: dict[str, Any]) -> None:
    """Half of it beside the way there, half beside the way home; its gradients beside those of either."""
    assert pool.run(jobs_overlap.order, fold, fields, ranks=2) == [(FORWARD, BACKWARD)] * 2


def test_chunks(pool: RankPool) -> None:
    """Two parts on either way; the shared expert beside the first to go and, coming home, beside the last."""
    forward = [
        "start",
        "in",
        "in",
        "start",
        "wait",
        "experts",
        "start",
        "wait",
        "experts",
        "start",
        "out",
        "wait",
        "wait",
    ]
    backward = [
        "start",
        "start",
        "out'",
        "wait",
        "experts'",
        "start",
        "wait",
        "experts'",
        "start",
        "wait",
        "in'",
        "in'",
        "wait",
    ]
    assert pool.run(jobs_overlap.order, "ep2", {"chunks": 2}, ranks=2) == [(forward, backward)] * 2


def test_by_node(pool: RankPool) -> None:
    """The shared expert beside the exchange between nodes."""
    forward = ["start", "in", "in", "wait", "start", "wait", "experts", "start", "wait", "start", "out", "wait"]
    backward = ["start", "out'", "wait", "start", "wait", "experts'", "start", "wait", "start", "in'", "in'", "wait"]
    fields = {"dispatcher": "hierarchical", "node_size": 2}
    assert pool.run(jobs_overlap.order, "ep4", fields, ranks=4) == [(forward, backward)] * 4


@pytest.mark.parametrize("other_stream", [False, True])
def test_memory_waits_for_the_stream_that_waited(other_stream: bool) -> None:
    """What travels lives until it has; on another stream than that of the start, until that one is through, too."""
    x, out = (mock.Mock(is_cuda=True, device="cuda:0") for _ in range(2))
    x.contiguous.return_value = x
    route = SimpleNamespace(start=lambda *_: (mock.Mock(), out), finish=lambda out, _: out)
    handle = Handle([route], mock.Mock())  # type: ignore[list-item]
    with mock.patch.object(torch.cuda, "current_stream", side_effect=["first", "second" if other_stream else "first"]):
        handle.start([x])
        assert handle._pending[0][2:] == (x, out)
        assert handle.wait() == [out]
    expected = [mock.call("second")] if other_stream else []
    assert x.record_stream.call_args_list == out.record_stream.call_args_list == expected
    assert not handle._pending

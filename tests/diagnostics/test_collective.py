# SPDX-License-Identifier: Apache-2.0
"""Which collective an error is put down to: the one that was called or waited for, not one that was over already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

from lightning_moefold.async_comm import Exchange, Handle
from lightning_moefold.diagnostics.collective import Collective, find_collective
from lightning_moefold.mesh import Axis

EP = Axis("ep", (0, 1), 0, mock.sentinel.experts)
TP = Axis("tp", (0, 2), 0, mock.sentinel.tensors)


def defined_in(module: str, source: str, **names: Any) -> dict[str, Any]:
    """The names that ``source`` defines, with frames that say they are of ``module``."""
    namespace: dict[str, Any] = {"__name__": module, **names}
    exec(source, namespace)
    return namespace


def found(function: Callable[..., Any], *arguments: Any) -> Collective | None:
    with pytest.raises(RuntimeError, match="Connection closed by peer") as caught:
        function(*arguments)
    return find_collective(caught.value)


def test_a_wait_is_for_what_is_under_way() -> None:
    work = mock.Mock(wait=mock.Mock(side_effect=RuntimeError("Connection closed by peer")))
    handle = Handle([Exchange([1, 1], [1, 1])], EP)
    handle._pending = [(handle.routes[0], work, torch.ones(2), torch.ones(2))]
    with pytest.raises(RuntimeError) as caught:
        handle.wait()
    trace = caught.value.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_name != "wait":
        trace = trace.tb_next
    assert trace is not None
    trace.tb_next = None  # the frames of the mock stand for the work, which is not Python
    assert find_collective(caught.value) == Collective("all-to-all", "", "ep", (0, 1))


def test_an_axis_of_an_earlier_call_is_no_collective() -> None:
    """A function of ours that fails with an axis among its variables, as where a kernel reports late what went wrong."""
    ours = defined_in(
        "lightning_moefold.modules.moe", "def forward(axis):\n    raise RuntimeError('Connection closed by peer')"
    )
    assert found(ours["forward"], EP) is None


def test_the_group_of_the_call_names_the_axis() -> None:
    torch_code = defined_in(
        "torch.distributed.distributed_c10d",
        "def all_reduce(x, group):\n    raise RuntimeError('Connection closed by peer')",
    )
    ours = defined_in(
        "lightning_moefold.comm",
        "def twice(x, first, second):\n    all_reduce(x, group=second.group)",
        all_reduce=torch_code["all_reduce"],
    )
    assert str(found(ours["twice"], None, EP, TP)) == "the all-reduce over tp [0, 2]"
    assert str(found(ours["twice"], None, TP, EP)) == "the all-reduce over ep [0, 1]"
    stranger = Axis("cp", (0, 4), 0, mock.sentinel.strangers)
    ours = defined_in(
        "lightning_moefold.comm",
        "def other(x, axis, group):\n    all_reduce(x, group=group)",
        all_reduce=torch_code["all_reduce"],
    )
    told = found(ours["other"], None, stranger, mock.sentinel.unknown)
    assert told is not None
    assert told.axis != "cp"

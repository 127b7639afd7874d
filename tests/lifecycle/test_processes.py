# SPDX-License-Identifier: Apache-2.0
"""Which process groups a run on CUDA takes; torch names the backends of a group also where it could not make one."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from lightning_moefold.errors import InputError
from lightning_moefold.lifecycle import processes


def connect(monkeypatch: pytest.MonkeyPatch, found: str, ranks: int, given: str | None) -> mock.Mock:
    """Connects to a group that exists; returns what Lightning was asked for."""
    connected = mock.Mock()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: ranks)
    monkeypatch.setattr(
        dist, "get_backend_config", lambda: str(dist.distributed_c10d.BackendConfig(dist.Backend(found)))
    )
    monkeypatch.setattr(processes, "_init_dist_connection", connected)
    processes.connect_processes(mock.Mock(), torch.device("cuda", 0), given, default_pg_timeout)
    return connected


@pytest.mark.parametrize("given", [None, "nccl"])
@pytest.mark.parametrize("found", ["nccl", "cuda:nccl"])
def test_a_group_without_a_backend_for_the_cpu_is_refused(
    monkeypatch: pytest.MonkeyPatch, found: str, given: str | None
) -> None:
    with pytest.raises(InputError, match=r"no backend for the CPU \(cuda:nccl\), .* init_process_group"):
        connect(monkeypatch, found, 2, given)


@pytest.mark.parametrize(("found", "ranks"), [("cpu:gloo,cuda:nccl", 2), ("gloo", 2), ("nccl", 1)])
def test_others_are_taken(monkeypatch: pytest.MonkeyPatch, found: str, ranks: int) -> None:
    """Also one of NCCL alone on one rank, which sends nothing."""
    connect(monkeypatch, found, ranks, None).assert_called_once()


def test_another_backend_than_the_given_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="'gloo' is not that of the process group which exists already"):
        connect(monkeypatch, "cpu:gloo,cuda:nccl", 2, "gloo")

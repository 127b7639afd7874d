# SPDX-License-Identifier: Apache-2.0
"""The process group of a run: joined or made once, and let go of while the interpreter still runs."""

from __future__ import annotations

import atexit
import gc
from datetime import timedelta

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.fabric.utilities.distributed import (
    _destroy_dist_connection,
    _get_default_process_group_backend_for_device,
    _init_dist_connection,
)
from torch.distributed.constants import default_pg_timeout

from lightning_moefold.errors import InputError
from lightning_moefold.mesh import forget_groups, set_timeout


def connect_processes(
    environment: ClusterEnvironment, device: torch.device, backend: str | None, timeout: timedelta | None
) -> None:
    """Makes the default process group, or goes on with the one that exists. Collective.

    Args:
        environment: Says who the others are.
        device: Of this rank.
        backend: As the user gave it; None to choose by device.
        timeout: Of collectives; the default one leaves a group that exists as it is.

    Raises:
        InputError: If the group that exists has another back end than the one given.
    """
    on_cuda = device.type == "cuda"
    fresh = not dist.is_initialized()
    if not fresh:
        _check_backend(backend, device.type)
        if timeout != default_pg_timeout:
            set_timeout(dist.group.WORLD, timeout)
    backend = backend or _get_default_process_group_backend_for_device(device)
    if on_cuda and backend == "nccl":
        # Objects and files travel over gloo; only tensors on the device use NCCL.
        backend = "cpu:gloo,cuda:nccl"
    _init_dist_connection(environment, backend, timeout=timeout, device_id=device if on_cuda else None)
    if fresh:  # a process that ends with open groups may abort (gloo) or is complained of (NCCL)
        atexit.register(_end_processes)


def _check_backend(asked: str | None, device: str) -> None:
    found = dist.get_backend_config()
    on_devices = dict(part.split(":") for part in found.split(",") if ":" in part)
    if asked is not None and asked not in (found, on_devices.get(device)):
        raise InputError(
            f"process_group_backend={asked!r} is not that of the process group which exists already ({found}); leave it out, "
            "or start the processes anew."
        )


def _end_processes() -> None:
    """Destroys all groups: one that the interpreter destroys at its end may still have threads that use it."""
    forget_groups()
    _destroy_dist_connection()
    gc.collect()

# SPDX-License-Identifier: Apache-2.0
"""The process group of a run: created or reused, and destroyed before the interpreter ends."""

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
    """Creates the default process group, or uses the existing one, whose timeout the default does not change. Collective.

    Args:
        environment: Lightning's cluster environment, which knows the other ranks.
        device: This rank's device.
        backend: Backend given by the user; None to choose by device.
        timeout: Timeout of collectives.

    Raises:
        InputError: If the existing group has another backend than the given one, or several ranks on CUDA have none for tensors
            on the CPU.
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
    if fresh:  # at exit, open groups may abort the process (gloo) or cause a warning (NCCL)
        atexit.register(_end_processes)
    if on_cuda and dist.get_world_size() > 1:
        _check_cpu_backend()


def _check_backend(asked: str | None, device: str) -> None:
    found, on_devices = _backends()
    if asked is not None and asked not in (found, on_devices.get(device)):
        raise InputError(
            f"process_group_backend={asked!r} is not that of the process group which exists already ({found}); leave it out, "
            "or start the processes anew."
        )


def _check_cpu_backend() -> None:
    found, on_devices = _backends()
    if "cpu" not in on_devices:
        raise InputError(
            f"the default process group has no backend for the CPU ({found}), over which ranks count batches and send weights to "
            "files; make it with init_process_group('cpu:gloo,cuda:nccl'), or leave that to the strategy, without "
            "process_group_backend."
        )


def _backends() -> tuple[str, dict[str, str]]:
    """Returns the configuration of the default group, such as ``"cpu:gloo,cuda:nccl"``, and the backend of each device."""
    found = dist.get_backend_config()
    return found, dict(part.split(":") for part in found.split(",") if ":" in part)


def _end_processes() -> None:
    """Destroys all groups before the interpreter does, because their threads may still be running then."""
    forget_groups()
    _destroy_dist_connection()
    gc.collect()

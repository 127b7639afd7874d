# SPDX-License-Identifier: Apache-2.0
"""The child side of :class:`~lightning_moefold.testing.pool.RankPool`: one process that runs one rank of each case.

The conversation over the pipe, one case at a time (every message is a plain pickle, so no memory or file descriptor
is ever shared between the processes):

===================  ======================================  =================================================
parent sends         the worker does                         and answers
===================  ======================================  =================================================
(start)              imports torch                           ``Outcome()``
a ``Request``        imports the function, unpickles         ``Outcome()`` or ``Outcome(failure=...)``
``"go"``             joins the group, calls the function     ``Outcome(payload=...)`` or ``Outcome(failure=...)``
``"finish"``         destroys the group, forgets the case    ``Outcome()``
===================  ======================================  =================================================

A function that raised destroys its group at once, so that peers waiting in a collective see a closed connection. One
that succeeded keeps its group until *all* ranks have: closing earlier could break a peer's last collective.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import functools
import gc
import importlib
import importlib.util
import io
import os
import pickle
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any, TextIO

import torch
import torch.distributed as dist

from lightning_moefold.mesh import forget_groups

SEED = 20240607
"""Seeds ``torch``, ``random`` and ``numpy`` before each case, so that no case depends on the one before it."""

LOOPBACK = "127.0.0.1"

_CACHED_FUNCTION = type(functools.lru_cache(lambda: None))


@dataclasses.dataclass(frozen=True)
class Request:
    """One rank's share of a case.

    Attributes:
        rank: This process's rank, in ``[0, world_size)``.
        world_size: Number of ranks of the case.
        store_port: Loopback port of the TCP store over which the ranks find each other.
        master_port: Another free port, for code that reads ``MASTER_PORT``.
        timeout: Timeout of the process group, in seconds.
        threads: Intra-operator threads.
        module: Name and, where known, file of the module that defines the function.
        call: Pickle of ``(function, args, kwargs)``.
        environ: The parent's environment variables.
        sys_path: The parent's import path.
        cwd: The parent's working directory.
    """

    rank: int
    world_size: int
    store_port: int
    master_port: int
    timeout: float
    threads: int
    module: tuple[str, str | None]
    call: bytes
    environ: dict[str, str]
    sys_path: list[str]
    cwd: str


@dataclasses.dataclass(frozen=True)
class RankFailure:
    """An error of one rank as text, since an exception may not survive pickling.

    Attributes:
        exception_type: Name of the exception's class.
        message: ``str(exception)``.
        traceback: The formatted traceback.
        when: ``time.monotonic()`` when it was caught; comparable over the processes of one machine.
    """

    exception_type: str
    message: str
    traceback: str
    when: float

    @classmethod
    def current(cls) -> RankFailure:
        """Describes the exception being handled."""
        error = sys.exc_info()[1]
        return cls(type(error).__name__, str(error), traceback.format_exc(), time.monotonic())


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A worker's answer to one message: success, with the pickled result if there is one, or a failure."""

    payload: bytes | None = None
    failure: RankFailure | None = None


def main(fd: int, parent: int, traces: str) -> None:
    """Serves cases until the parent hangs up.

    Args:
        fd: This end of the pipe.
        parent: Process id of the parent.
        traces: File that receives the stacks of all threads on ``SIGUSR1``.
    """
    _die_with(parent)
    connection = Connection(fd)
    with open(traces, "w") as trace_file, contextlib.suppress(EOFError, ConnectionError):
        _register_stack_dump(trace_file)
        _send(connection, Outcome())
        while True:
            request = pickle.loads(connection.recv_bytes())
            _register_stack_dump(trace_file)
            _run_case(connection, request)


def dumps(value: Any) -> bytes:
    """Pickles a result; tensors travel as detached, contiguous CPU copies.

    Args:
        value: Any picklable structure.

    Returns:
        The pickle.

    Raises:
        TypeError: If the result holds a DTensor, whose mesh is meaningless outside its process group.
    """
    buffer = io.BytesIO()
    _ResultPickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


class _ResultPickler(pickle.Pickler):
    """Writes tensors by value: neither a view's whole storage nor shared memory leaves the process."""

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, torch.Tensor):
            return NotImplemented
        if hasattr(obj, "device_mesh"):
            raise TypeError("a DTensor cannot be returned from a rank: return full_tensor() or to_local()")
        buffer = io.BytesIO()
        torch.save(obj.detach().cpu().contiguous().clone(), buffer)
        return _load_tensor, (buffer.getvalue(),)


def _load_tensor(data: bytes) -> torch.Tensor:
    tensor = torch.load(io.BytesIO(data), weights_only=True)
    assert isinstance(tensor, torch.Tensor)
    return tensor


def _die_with(parent: int) -> None:
    """Asks the kernel to kill this process when its parent dies (Linux; elsewhere the closed pipe ends it)."""
    if sys.platform != "linux":
        return
    import ctypes

    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(signal.SIGKILL))
    if os.getppid() != parent:  # the parent died before the request
        os._exit(1)


def _register_stack_dump(file: TextIO) -> None:
    """Makes ``SIGUSR1`` write the stacks of all threads; called for each case.

    At its end a ``Trainer`` resets all signals to the handlers that Python knows, which do not include this one.
    """
    faulthandler.unregister(signal.SIGUSR1)  # otherwise register() assumes that the handler is in place
    faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)


def _send(connection: Connection, outcome: Outcome) -> None:
    connection.send_bytes(pickle.dumps(outcome))


def _run_case(connection: Connection, request: Request) -> None:
    """Runs one case through the three messages described at the top of the module."""
    outcome, call = Outcome(), None
    try:
        _restore_defaults(request)
        call = _load_call(request)
    except BaseException:
        outcome = Outcome(failure=RankFailure.current())
    _send(connection, outcome)
    message = pickle.loads(connection.recv_bytes())
    if message == "go" and call is not None:
        outcome = _call(request, *call)
        _send(connection, outcome)  # before the group is destroyed, which can block while operations run
        if outcome.failure is not None:
            _destroy_group()
        message = pickle.loads(connection.recv_bytes())
    assert message == "finish", message
    del call
    _forget_case()
    _send(connection, Outcome())


def _call(request: Request, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Outcome:
    """Calls the function inside a fresh process group, which stays open."""
    try:
        _join_group(request)
        return Outcome(payload=dumps(function(*args, **kwargs)))
    except BaseException:
        return Outcome(failure=RankFailure.current())


def _join_group(request: Request) -> None:
    timeout = timedelta(seconds=request.timeout)
    store = dist.TCPStore(LOOPBACK, request.store_port, is_master=False, timeout=timeout)
    dist.init_process_group("gloo", store=store, rank=request.rank, world_size=request.world_size, timeout=timeout)


def _destroy_group() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _restore_defaults(request: Request) -> None:
    """Puts the process into the same state before each case, whatever earlier cases have changed."""
    os.environ.clear()
    os.environ.update(request.environ)
    os.environ.update(_rank_variables(request))
    sys.path[:] = request.sys_path
    os.chdir(request.cwd)
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.set_grad_enabled(True)
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(request.threads)
    random.seed(SEED)
    torch.manual_seed(SEED)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(SEED)
    # Lightning keeps its rank in an attribute that is set from the environment at import, in the first case.
    if (rank_zero := sys.modules.get("lightning_utilities.core.rank_zero")) is not None:
        rank_zero.rank_zero_only.rank = request.rank


def _rank_variables(request: Request) -> dict[str, str]:
    rank, size, threads = str(request.rank), str(request.world_size), str(request.threads)
    return {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "GROUP_RANK": "0",
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(request.master_port),
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        # Without it, gloo resolves the host's name, which may fail or give an outside address.
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
    }


def _load_call(request: Request) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """Imports the function's module first, so that the pickle finds it under the name that the parent uses."""
    _import_module(*request.module)
    _imported.hide()
    function, args, kwargs = pickle.loads(request.call)
    return function, args, kwargs


def _import_module(name: str, file: str | None) -> ModuleType:
    """Imports a module by name, or from its file if the name is not importable or belongs to another file.

    Test modules need not be importable by name: two folders may each hold a ``test_x.py``.
    """
    try:
        module = importlib.import_module(name)
        if file is None or _same_file(getattr(module, "__file__", None), file):
            return module
    except ModuleNotFoundError as error:
        if file is None or error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot import {name} from {file}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _same_file(a: str | None, b: str) -> bool:
    return a is not None and os.path.realpath(a) == os.path.realpath(b)


def _forget_case() -> None:
    """Destroys the group and drops state that would affect the next case."""
    _destroy_group()
    forget_groups()
    _clear_dtensor_caches()
    gc.collect()  # models and meshes form reference cycles and hold process groups, each with a thread of gloo


def _clear_dtensor_caches() -> None:
    """Empties DTensor's caches of sharding decisions.

    Two meshes are equal if their ranks and axis names are, whatever groups they hold; a cached decision would hand
    the next case a mesh whose groups are destroyed, or worse, whose group names now mean other ranks. Meshes kept here
    also keep the groups' threads: after thirty cases a process had 115, and took twice as long.
    """
    if "torch.distributed.tensor" not in sys.modules:
        return
    from torch.distributed.tensor import _random, _redistribute, debug

    debug._clear_sharding_prop_cache()
    _random._rng_tracker = None
    getattr(_redistribute, "clear_redistribute_planner_cache", lambda: None)()  # not in every version of torch
    for cached in (*_imported.caches, *_dtensor_caches()):
        cached.cache_clear()


def _dtensor_caches() -> list[Any]:
    """Returns the cached functions of DTensor, methods included, of which the collector knows (see :class:`_Imported`)."""
    return [
        value
        for value in gc.get_objects()
        # By type, because isinstance would call objects that pretend to be of another class.
        if issubclass(type(value), _CACHED_FUNCTION) and str(value.__module__).startswith("torch.distributed.tensor")
    ]


class _Imported:
    """Takes the objects of imported modules, 600,000 or so, out of the collector's sight: they stay, whatever a case does.

    With them in sight, going through all objects after each case took half a second of each rank, more than many cases.

    Attributes:
        caches: The cached functions of DTensor among them.
    """

    def __init__(self) -> None:
        self.caches: list[Any] = []
        self._modules = 0

    def hide(self) -> None:
        """Called between two cases, when nothing of a case is left."""
        if len(sys.modules) > self._modules:
            self._modules = len(sys.modules)
            self.caches += _dtensor_caches()
            gc.freeze()


_imported = _Imported()
